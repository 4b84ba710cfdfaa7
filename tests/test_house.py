"""The laws of the house: who imports whom, what the core leaves alone, how long things may be."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tinydance"
ORDER = ["weights", "core", "video", "toy", "data", "metrics", "run", "scripts"]
FILES = [*sorted(PACKAGE.rglob("*.py")), ROOT / "train.py", ROOT / "sample.py"]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
ABOVE = {PACKAGE: "core", ROOT: "scripts"}
ROOM = {path: ABOVE.get(path.parent, path.parent.name) for path in FILES}
CORE = [path for path in FILES if ROOM[path] == "core"]
DOORS = {path.parent / "__init__.py" for path in FILES if ROOM[path] not in ABOVE.values()}
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}


def read_imports(path):
    """The names of the modules that a file imports, also inside functions."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the import from its root, tinydance"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)


def find_own(path):
    return {MODULES[name] for name in read_imports(path) if name in MODULES}


def count_lines(path):
    """(all lines, lines of code, lines of comments and docstrings) of a file."""
    lines, docs = path.read_text(encoding="utf-8").splitlines(), set()
    for node in ast.walk(TREES[path]):
        kind = ast.Module | ast.ClassDef | ast.FunctionDef
        if isinstance(node, kind) and ast.get_docstring(node):
            docs |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    docs |= {n for n, line in enumerate(lines, 1) if line.strip().startswith("#")}
    blank = {n for n, line in enumerate(lines, 1) if not line.strip()} - docs
    return len(lines), len(lines) - len(docs) - len(blank), len(docs)


def test_imports_go_one_way():
    for path in FILES:
        room, source = ROOM[path], ast.unparse(TREES[path])
        allowed = ["weights", "core"] if room == "variants" else ORDER[: ORDER.index(room)]
        if room == "scripts" or "if __name__ == '__main__'" in source:  # or a room's command
            allowed = [*allowed, "run", "variants"]
        strangers = [other for other in find_own(path) if ROOM[other] not in (room, *allowed)]
        assert strangers == [], path


def test_no_imports_form_a_circle():
    TopologicalSorter({path: find_own(path) for path in FILES}).prepare()


def test_the_core_needs_torch_numpy_and_the_standard_library():
    known = {"tinydance", "torch", "numpy", *sys.stdlib_module_names}
    for path in CORE:
        assert {name.split(".")[0] for name in read_imports(path)} <= known, path


def test_the_core_prints_nothing_parses_no_arguments_and_opens_no_file():
    forbidden = {"print", "input", "open", "read_text", "read_bytes", "write_text", "write_bytes"}
    for path in CORE:
        assert not {"sys", "argparse", "logging", "tqdm"} & {*read_imports(path)}, path
        calls = [node.func for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]
        assert not {ast.unparse(name).split(".")[-1] for name in calls} & forbidden, path
        # What torchrun sets in the environment is read in one place.
        readers = [node for node in TREES[path].body if "environ" in ast.unparse(node)]
        names = [getattr(node, "name", "") for node in readers]
        assert names == (["Machine"] if path.name == "training.py" else []), path


def test_training_loads_neither_pyav_nor_pillow():
    program = "import sys, tinydance.training; sys.exit(bool({'av', 'PIL'} & {*sys.modules}))"
    subprocess.check_call([sys.executable, "-c", program], cwd=ROOT)


def test_opening_a_model_does_not_load_the_compiler():
    """Which takes two seconds, of everybody who makes a clip."""
    program = (
        "import sys; from tinydance.model import PixelDance; from tinydance.toy import SHIPPED"
    )
    program += "; PixelDance.from_folder(SHIPPED); sys.exit('torch._dynamo' in sys.modules)"
    subprocess.check_call([sys.executable, "-c", program], cwd=ROOT)


def test_a_room_has_a_manual_and_one_door_that_names_at_most_eight_things():
    for door in DOORS:
        names = [node.names for node in TREES[door].body if isinstance(node, ast.ImportFrom)]
        names = {alias.name for aliases in names for alias in aliases} - {"Path"}
        stores = [node for node in ast.walk(TREES[door]) if isinstance(node, ast.Name)]
        names |= {node.id for node in stores if isinstance(node.ctx, ast.Store)} - {"__all__"}
        assert len(names) <= 8, (door, names)
        assert 4 <= len((ast.get_docstring(TREES[door]) or "").splitlines()) <= 12, door
        assert (door.parent / "README.md").is_file(), door


def test_the_house_stays_small():
    lines = {path: count_lines(path)[0] for path in FILES}
    sizes = {str(path.relative_to(ROOT)): count for path, count in lines.items()}
    limits = {name: 300 for name in sizes} | {"everything": 9100}
    limits |= {"tinydance/unet.py": 500, "tinydance/clip.py": 350}
    for room in {*ROOM.values()}:
        sizes[room] = sum(count for path, count in lines.items() if ROOM[path] == room)
        limits[room] = 2500 if room == "core" else 1250
    sizes["everything"] = sum(lines.values())
    assert {name: size for name, size in sizes.items() if size > limits[name]} == {}


def test_the_core_explains_itself():
    _, code, docs = map(sum, zip(*map(count_lines, CORE)))
    assert 0.35 <= docs / code <= 0.5


def test_one_table_is_not_formatted_and_one_docstring_gives_the_order_of_reading():
    files = [*FILES, *Path(__file__).parent.glob("*.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    kept = {path.name: text.count("# fmt" + ": skip") for path, text in texts.items()}
    assert {name: count for name, count in kept.items() if count} == {"config.py": 1}
    for path in {*FILES} - {PACKAGE / "__init__.py"}:
        assert "read before" not in texts[path].lower() and "read after" not in texts[path].lower()
