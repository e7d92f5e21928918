"""The module as a whole: a book whose map is its docstring, and which is read from the top.

Rulers cut the file into nine parts and their sections:

    # ======= 1. Foundations ====...
    # === Exceptions ====...

Each check is a function of the file's text, so that it can be shown to fail on a broken one.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import vqa_helpers as vqa

SOURCE = Path(vqa.__file__).read_text(encoding="utf-8")
SECTION_LINES = 400
FUNCTION_LINES = 80
LINE_WIDTH = 100
PART_RULER = re.compile(r"# ={7} (\d+\. .+?) =+")
SECTION_RULER = re.compile(r"# === (.+?) =+")
# The map has a part at the margin, and a section three spaces in, before what it is about.
PART_OF_MAP = re.compile(r"(\d+\. .+)")
SECTION_OF_MAP = re.compile(r"   (\S.*?)  +\S.*")
END_OF_MAP = "Where to change what:"


# --- What the checks read -------------------------------------------------------------------------


def titles(lines, part, section):
    """Parts and sections in their order, each found by its pattern."""
    found = []
    for line in lines:
        match = part.fullmatch(line) or section.fullmatch(line)
        if match:
            found.append(match[1])
    return found


def section_starts(source):
    """Number and title of each section's ruler."""
    starts = []
    for number, line in enumerate(source.splitlines(), 1):
        match = SECTION_RULER.fullmatch(line)
        if match:
            starts.append((number, match[1]))
    return starts


def section_of(line_number, source_starts):
    """How many sections begin up to this line; 0 above the first."""
    return sum(start <= line_number for start, _ in source_starts)


def defined_names(statement):
    """The names that a statement of the module gives to functions, classes and values."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    else:
        return []
    names = []
    for target in targets:
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        names += [part.id for part in parts if isinstance(part, ast.Name)]
    return names


def annotations_in(statement):
    """All nodes of annotations, which nobody evaluates."""
    found = set()
    for node in ast.walk(statement):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None:
                found.update(ast.walk(annotation))
    return found


def used_names(statement):
    """Line and name of everything that a statement reads, annotations aside."""
    skipped = annotations_in(statement)
    for node in ast.walk(statement):
        is_read = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        if is_read and node not in skipped:
            yield node.lineno, node.id


# --- The checks -----------------------------------------------------------------------------------


def differences_from_map(source):
    """Where the map in the docstring and the rulers part ways."""
    parts, _, _ = ast.get_docstring(ast.parse(source)).partition(END_OF_MAP)
    mapped = titles(parts.splitlines(), PART_OF_MAP, SECTION_OF_MAP)
    ruled = titles(source.splitlines(), PART_RULER, SECTION_RULER)
    missing = [title for title in ruled if title not in mapped]
    unknown = [title for title in mapped if title not in ruled]
    found = [f"not in the map: {title}" for title in missing]
    found += [f"only in the map: {title}" for title in unknown]
    if not found and mapped != ruled:
        displaced = [title for title, ruler in zip(mapped, ruled, strict=False) if title != ruler]
        found += [f"in another place than in the map: {title}" for title in displaced[:1]]
    return found


def uses_of_later_sections(source):
    """Every name that is used above the section that defines it."""
    statements = ast.parse(source).body
    starts = section_starts(source)
    home = {}
    for statement in statements:
        for name in defined_names(statement):
            home.setdefault(name, section_of(statement.lineno, starts))
    found = []
    for statement in statements:
        here = section_of(statement.lineno, starts)
        for line_number, name in used_names(statement):
            if home.get(name, 0) > here:
                _, title = starts[home[name] - 1]
                found.append(f"line {line_number} uses {name} of the later section {title!r}")
    return found


def long_sections(source):
    starts = section_starts(source)
    first_lines = [number for number, _ in starts]
    end_of_file = len(source.splitlines()) + 1
    found = []
    for (start, title), end in zip(starts, [*first_lines[1:], end_of_file], strict=True):
        if end - start > SECTION_LINES:
            found.append(f"line {start}: section {title!r} has {end - start} lines")
    return found


def long_functions(source):
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES:
                found.append(f"line {node.lineno}: {node.name} has {length} lines")
    return found


def wide_lines(source):
    found = []
    for number, line in enumerate(source.splitlines(), 1):
        if len(line) > LINE_WIDTH:
            found.append(f"line {number} has {len(line)} characters")
    return found


CHECKS = [differences_from_map, uses_of_later_sections, long_sections, long_functions, wide_lines]


@pytest.mark.parametrize("check", CHECKS)
def test_the_module_is_built_as_its_map_says(check):
    assert check(SOURCE) == []


# --- The checks find what is wrong ----------------------------------------------------------------

SMALL_MODULE = '''"""A small module.

1. Foundations
   Files        reading and writing
   Checkpoints  whole or absent
2. Data
   Tables       rows
"""

# ======= 1. Foundations ===========================================================================

# === Files ========================================================================================
SUFFIX = ".json"


def read(path: Table):
    return open(path + SUFFIX)


# === Checkpoints ==================================================================================
def restore(path):
    return read(path)


# ======= 2. Data ==================================================================================

# === Tables =======================================================================================
class Table:
    rows = restore("rows")
'''


def test_a_sound_module_passes_every_check():
    """An annotation may name what is defined below."""
    for check in CHECKS:
        assert check(SMALL_MODULE) == []


BROKEN = {
    "a section that is not in the map": (
        differences_from_map,
        SMALL_MODULE.replace("   Checkpoints  whole or absent\n", ""),
        ["not in the map: Checkpoints"],
    ),
    "a part that is only in the map": (
        differences_from_map,
        SMALL_MODULE.replace("# ======= 2. Data", "# 2. Data"),
        ["only in the map: 2. Data"],
    ),
    "another order": (
        differences_from_map,
        SMALL_MODULE.replace("# === Files =", "# === X =")
        .replace("# === Checkpoints =", "# === Files =")
        .replace("# === X =", "# === Checkpoints ="),
        ["in another place than in the map: Files"],
    ),
    "a function of a later section": (
        uses_of_later_sections,
        SMALL_MODULE.replace("open(path + SUFFIX)", "restore(path)"),
        ["line 17 uses restore of the later section 'Checkpoints'"],
    ),
    "a default value of a later section": (
        uses_of_later_sections,
        SMALL_MODULE.replace("path: Table", "path=Table"),
        ["line 16 uses Table of the later section 'Tables'"],
    ),
    "a long section": (
        long_sections,
        SMALL_MODULE.replace("class Table:", "\n" * 400 + "class Table:"),
        ["line 27: section 'Tables' has 403 lines"],
    ),
    "a long function": (
        long_functions,
        SMALL_MODULE.replace("    return read(path)", "    pass\n" * 80),
        ["line 21: restore has 81 lines"],
    ),
    "a wide line": (
        wide_lines,
        SMALL_MODULE.replace('".json"', '".json"  # ' + "x" * 90),
        ["line 13 has 110 characters"],
    ),
}


@pytest.mark.parametrize(("check", "source", "found"), BROKEN.values(), ids=BROKEN)
def test_a_check_names_the_line_of_a_broken_module(check, source, found):
    assert source != SMALL_MODULE
    assert check(source) == found


# --- Names and imports ----------------------------------------------------------------------------


def test_where_to_change_what_names_sections_and_code_that_exist():
    _, _, list_of_changes = vqa.__doc__.partition(END_OF_MAP)
    code = SOURCE.removeprefix(f'"""{vqa.__doc__}"""')
    names = re.findall("`(.+?)`", list_of_changes)
    assert [name for name in names if name not in code] == []
    sections = [title for _, title in section_starts(SOURCE)]
    mentioned = [title for title in sections if title in list_of_changes]
    assert len(names) >= 5
    assert len(mentioned) >= 10


def test_no_name_is_defined_twice():
    """The second definition would silently replace the first."""
    names = Counter()
    for statement in ast.parse(SOURCE).body:
        names.update(defined_names(statement))
    assert [name for name, count in names.items() if count > 1] == []


def test_import_is_inert():
    """It seeds nothing, logs nothing, and loads no large library."""
    code = """
import random
import sys

random.seed(1)
before = random.getstate()

import logging
import vqa_helpers

assert random.getstate() == before
assert not logging.getLogger("vqa").handlers
heavy = {"torch", "transformers", "peft", "bitsandbytes", "matplotlib"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=vqa.HERE)
