"""A grader: the user's own Python file with grade(query, response, finished), 0 to 1."""

import runpy
from pathlib import Path

from plumbing.records import UserError


def load_grader(path):
    """The function grade(query, response) of a grader's file. An error in it names the query."""
    if not Path(path).is_file():
        raise UserError(f"--grader {path}: no such file")
    try:
        graders = runpy.run_path(str(path))
    except Exception as error:              # of any kind: the file is the user's own
        raise UserError(f"--grader {path}: {type(error).__name__}: {error}") from error
    if "grade" not in graders:
        raise UserError(f"--grader {path}: it has no function grade(query, response, finished)")

    def grade(query, response):
        place = f"--grader {path}, on the query {query[:60]!r}"
        try:
            mark = float(graders["grade"](query, response.text, response.finished))
        except Exception as error:
            raise UserError(f"{place}: {type(error).__name__}: {error}") from error
        if not 0 <= mark <= 1:
            raise UserError(f"{place}: {mark} is no mark from 0 to 1")
        return mark
    return grade
