"""`--solutions`: the exercises' tests run on lessons/solutions."""

from pathlib import Path

import pytest

LESSONS = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption("--solutions", action="store_true", help="test lessons/solutions")


@pytest.fixture
def folder(request):
    """Of the files that are tested."""
    if request.config.getoption("--solutions"):
        return LESSONS / "solutions"
    return LESSONS
