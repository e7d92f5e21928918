"""The project's files agree with one another: versions, requirements, commands, the top level."""

from packaging.requirements import Requirement

import vqa_helpers as vqa


def read(name):
    return (vqa.HERE / name).read_text(encoding="utf-8")


def test_notebook_and_module_have_one_version():
    notebook = read("Kaggle_AllInOne.ipynb").replace('\\"', '"')
    assert f'"{vqa.__version__}"' in notebook


def test_requirements_ask_for_the_notebooks_own_minimum_versions():
    wanted = {}
    for line in read("requirements.txt").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            wanted[requirement.name] = str(requirement.specifier)
    for name, version in vqa.MINIMUM_VERSIONS.items():
        assert wanted[name] == f">={version}"


def test_readme_and_ci_run_the_same_two_commands():
    install = "pip install -r requirements.txt && "
    lines = read("README.md").splitlines()
    commands = [line.removeprefix(install) for line in lines if line.startswith(install)]
    assert len(commands) == 2
    for command in commands:
        assert command in read(".ci/run")


TOP_LEVEL = {
    "Kaggle_AllInOne.ipynb",
    "vqa_helpers.py",
    "requirements.txt",
    "tests",
    "data",
    "README.md",
    "outputs",
}


def test_top_level_holds_nothing_but_the_agreed_files():
    names = {path.name for path in vqa.HERE.iterdir()}
    assert {name for name in names if not name.startswith((".", "_"))} <= TOP_LEVEL
