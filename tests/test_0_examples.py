"""The examples in the module's docstrings are run, and say what they show.

Public functions of arrays, strings and dictionaries carry one, which a reader can check by eye.
"""

import doctest
import inspect

import pytest

import vqa_helpers as vqa

PUBLIC_FUNCTIONS_WITH_EXAMPLE = 25


def own_objects():
    """Name and object of the module's functions and classes.

    Libraries are left out: one that is imported at its first use would be imported by looking.
    """
    for name, item in vars(vqa).items():
        is_documented = inspect.isfunction(item) or inspect.isclass(item)
        if is_documented and item.__module__ == vqa.__name__:
            yield name, item


def documented_objects():
    """The examples of each object that has some, by the object's name."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {}
    for name, item in own_objects():
        for test in finder.find(item, name, module=vqa, globs=dict(vars(vqa))):
            if test.examples:
                found[test.name] = test
    return found


EXAMPLES = documented_objects()


@pytest.mark.parametrize("test", EXAMPLES.values(), ids=EXAMPLES)
def test_the_examples_show_what_happens(test):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    report = []
    results = runner.run(test, out=report.append, clear_globs=False)
    assert results.attempted == len(test.examples)
    assert results.failed == 0, "".join(report)


def test_a_wrong_example_is_found():
    """So that a silent runner cannot pass for a working one."""
    parser = doctest.DocTestParser()
    wrong = parser.get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    results = doctest.DocTestRunner().run(wrong, out=lambda text: None)
    assert results.failed == 1


def is_public_function(name):
    return not name.startswith("_") and inspect.isfunction(getattr(vqa, name, None))


def test_many_public_functions_have_an_example():
    with_example = [name for name in EXAMPLES if is_public_function(name)]
    assert len(with_example) >= PUBLIC_FUNCTIONS_WITH_EXAMPLE, with_example
