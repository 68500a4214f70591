"""The layout as rules: who may import whom, who may touch which library, how long things may grow, and that every knob is read."""

import ast
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from kto_ds.config import RunConfig

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "kto_ds").rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# A room is a folder of kto_ds, or a file of its top level. kto_ds itself holds only the version, and whoever needs it may have it.
# cli -> stages -> {rows, data, model, runtime, report, demo, doctor} -> {staging, artifacts, config} -> errors, and what the last column says besides.
ALLOWED = {
    "__main__": {"cli", "early"},
    "api": {"cli", "stages", "report", "runtime", "staging", "launching", "config", "config_text", "errors"},
    "cli": {"cli_apart", "stages", "config", "config_text", "early", "errors", "redaction", "streams"},
    "cli_apart": set(),
    "stages": {
        "rows", "data", "model", "runtime", "report", "demo", "doctor", "moving", "sweep", "losses", "advice", "artifacts", "staging", "launching", "config", "config_data",
        "config_text", "errors", "redaction",
    },
    "advice": {"config", "data"},
    "demo": {"artifacts", "config", "errors"},
    "moving": {"errors", "redaction"},
    "sweep": {"report", "artifacts", "errors"},
    "doctor": {"config", "errors", "redaction"},
    "report": {"artifacts", "config", "errors", "redaction"},
    "runtime": {"artifacts", "staging", "launching", "config", "early", "errors", "redaction", "streams"},  # early: which signals stop
    "model": {"artifacts", "config", "errors"},
    "data": {"rows", "artifacts", "config", "errors"},
    "rows": {"config_data", "errors"},
    "staging": {"artifacts", "errors"},
    "artifacts": {"errors"},
    "config": {"config_data", "config_types", "errors", "redaction"},
    "config_data": {"config_types", "errors"},
    "config_types": set(),
    "config_text": {"config", "config_data", "errors", "redaction"},
    "early": {"errors"},
    "errors": set(),
    "redaction": set(),
    "streams": set(),
    "launching": set(),
    "losses": set(),
    "": set(),
}
# Between rooms of one level, module by module: types that are handed over, and the one loop that makes batches to score them.
HAND_OVERS = {
    ("model.attention", "data.batch"),  # Segments
    ("model.flops", "data.dataset"),  # TokenizedSplit
    ("model.flops", "data.packing"),  # Unit
    ("model.generate", "data.continuation"),  # continuation_batch
    ("model.generate", "data.packing"),  # Layout
    ("model.policy", "data.batch"),  # Batch
    ("model.scoring", "data.batch"),  # Batch, make_batch
    ("model.scoring", "data.dataset"),  # TokenizedSplit
    ("model.scoring", "data.packing"),  # Layout, MicroBatch
    ("runtime.engine", "data.batch"),  # Batch
    ("runtime.engine", "model.attention"),  # Memory
    ("runtime.engine", "model.policy"),  # Policy
    ("runtime.engine", "model.routers"),  # RouterLoad
}
# A stage is one sub-command; these files hold what several of them share.
SHARED_BY_STAGES = {
    "stages.advising", "stages.announce", "stages.balance", "stages.build", "stages.identity", "stages.inputs", "stages.numerics", "stages.objective", "stages.progress",
    "stages.push", "stages.rehearsal", "stages.resume", "stages.run", "stages.run_page", "stages.samples", "stages.serving", "stages.step_work", "stages.trained",
}  # fmt: skip

FENCES = {
    "deepspeed": ("kto_ds/runtime/", "kto_ds/model/load.py"),
    "torch.distributed": ("kto_ds/runtime/collectives.py", "kto_ds/runtime/probes.py"),
    "peft": ("kto_ds/model/lora.py",),
    "wandb": ("kto_ds/report/wandb_",),
    "ruamel": ("kto_ds/config_text.py",),
    "argparse": ("kto_ds/cli.py", "kto_ds/cli_apart.py"),
    "pickle": (),
}

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
MAX_LOOP_LINES = 90  # stages/train.py


def module_of(file: str) -> str:
    """Return the dotted name below kto_ds: `data.batch`, `cli`, or an empty string for kto_ds itself."""
    return file.removeprefix("kto_ds").removesuffix(".py").removesuffix("__init__").strip("/").replace("/", ".")


def room_of(module: str) -> str:
    return module.split(".")[0]


MODULES = {module_of(file) for file in TREES}


def imports_of(file: str) -> Iterator[str]:
    """Yield every dotted name the file imports anywhere, in functions too; `from a import b` yields a.b, which may be a module or not."""
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_imports_of(file: str) -> set[str]:
    """Return the modules of kto_ds that the file imports."""
    found = set()
    for name in imports_of(file):
        if name.split(".")[0] == "kto_ds":
            inner = name.removeprefix("kto_ds").lstrip(".")
            found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    assert found <= MODULES, f"{file} imports {found - MODULES}, which do not exist"
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for file, tree in TREES.items():
        yield from ((file, node) for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


# arrows


def test_every_room_has_a_row_in_the_table():
    assert {room_of(module) for module in MODULES} <= ALLOWED.keys()


@pytest.mark.parametrize("file", TREES)
def test_imports_follow_the_arrows(file):
    module = module_of(file)
    for imported in package_imports_of(file) - {""}:
        allowed = room_of(imported) == room_of(module) or room_of(imported) in ALLOWED[room_of(module)] or (module, imported) in HAND_OVERS
        assert allowed, f"{file} may not import kto_ds.{imported}"


def test_every_hand_over_is_in_use():
    used = {(module_of(file), imported) for file in TREES for imported in package_imports_of(file)}
    assert HAND_OVERS - used == set()


def test_stages_do_not_import_one_another():
    for file in TREES:
        if room_of(module_of(file)) == "stages":
            siblings = {imported for imported in package_imports_of(file) if room_of(imported) == "stages"}
            assert siblings <= SHARED_BY_STAGES, f"{file} imports {siblings - SHARED_BY_STAGES}"


def cycle_in(edges: dict[str, set[str]]) -> list[str]:
    """Return the nodes that lie on a cycle or behind one: what is left after all nodes without open edges are taken away."""
    edges = {node: targets - {node} for node, targets in edges.items()}
    while done := {node for node, targets in edges.items() if not targets & edges.keys()}:
        edges = {node: targets for node, targets in edges.items() if node not in done}
    return sorted(edges)


def test_no_cycle_between_modules_or_rooms():
    modules = {module_of(file): package_imports_of(file) for file in TREES}
    rooms: dict[str, set[str]] = {}
    for module, imported in modules.items():
        rooms.setdefault(room_of(module), set()).update(map(room_of, imported))
    assert cycle_in(modules) == [] and cycle_in(rooms) == []
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == ["a", "b", "c", "d"]


# fences


@pytest.mark.parametrize("library", FENCES)
def test_a_library_is_used_behind_its_fence_only(library):
    users = [file for file in TREES if any(within(name, library) for name in imports_of(file))]
    assert [file for file in users if not file.startswith(FENCES[library])] == [] if FENCES[library] else users == []


def test_torch_distributed_is_not_reached_by_attribute():
    reached = [
        f"{file}:{node.lineno}" for file, tree in TREES.items() if not file.startswith(FENCES["torch.distributed"])
        for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "distributed"
    ]  # fmt: skip
    assert reached == []


def test_data_knows_neither_ranks_nor_devices():
    for file in TREES:
        if room_of(module_of(file)) == "data":
            assert not [name for name in imports_of(file) if any(within(name, library) for library in ("deepspeed", "torch.distributed", "torch.cuda", "kto_ds.runtime"))], file
            assert not [node.lineno for node in ast.walk(TREES[file]) if isinstance(node, ast.Attribute) and node.attr == "cuda"], file


def test_the_losses_know_torch_and_nothing_else():
    assert {name.split(".")[0] for name in imports_of("kto_ds/losses.py")} == {"torch", "typing"}


def test_deepspeed_is_initialized_in_one_place():
    callers = {file for file, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) == "deepspeed.initialize"}
    assert callers == {"kto_ds/runtime/engine.py"}


# config


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, annotation) of every leaf, those of list items included."""
    for name, field in model.model_fields.items():
        inner = [part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type) and issubclass(part, BaseModel)]
        if not inner:
            yield prefix + name, field.annotation
        for part in inner:
            yield from fields_of(part, f"{prefix}{name}.")


def has_one_value(annotation: object) -> bool:
    """Whether the type admits a single value, such as None or Literal["error"]: there is nothing to read then."""
    return annotation in (None, types.NoneType) or get_origin(annotation) is Literal and len(set(get_args(annotation))) == 1


def test_every_config_field_has_a_reader():
    read = {node.attr for file, tree in TREES.items() if file != "kto_ds/config.py" for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    # RunConfig's own properties read the defaults of other fields, and are read in turn.
    properties = [node for node in ast.walk(TREES["kto_ds/config.py"]) if isinstance(node, ast.FunctionDef) and node.name in read]
    read |= {node.attr for function in properties for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    keys = dict(fields_of(RunConfig))
    assert len(keys) > 40
    assert [key for key, annotation in keys.items() if key.rsplit(".", 1)[-1] not in read and not has_one_value(annotation)] == []


def test_only_the_stages_and_the_door_see_the_whole_config():
    users = {module_of(file) for file in TREES for name in imports_of(file) if name == "kto_ds.config.RunConfig"}
    assert {room_of(module) for module in users} <= {"api", "cli", "config_text", "stages"}


# sizes and habits


@pytest.mark.parametrize("file", TREES)
def test_files_stay_short(file):
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


def test_functions_fit_a_screen():
    for file, node in functions():
        limit = MAX_LOOP_LINES if file == "kto_ds/stages/train.py" else MAX_FUNCTION_LINES
        length = node.end_lineno - node.lineno + 1
        assert length <= limit, f"{file}:{node.lineno}: {node.name} has {length} lines, {limit} allowed"


def test_no_file_is_named_after_nothing():
    assert {path.stem for path in FILES} & {"utils", "util", "helpers", "common", "misc", "trainer", "callbacks", "registry"} == set()


def test_attributes_are_rarely_reached_by_name():
    calls = [
        f"{file}:{node.lineno}" for file, tree in TREES.items() for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
    ]  # fmt: skip
    num_lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES)
    assert len(calls) <= max(2, num_lines / 1000), calls


def test_classes_do_not_inherit_from_one_another():
    """Depth 1, but for modules, autograd functions, errors, records and the sections of the config."""
    ours = {node.name: node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    bases = {name: {ast.unparse(base) for base in node.bases} & ours.keys() for name, node in ours.items()}
    assert {base for found in bases.values() for base in found} <= {"Section", "KtoError", "RunConfig"}


def test_no_error_is_swallowed():
    """No bare except; one that catches everything uses the error, or prints the traceback."""
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                assert node.type, f"{file}:{node.lineno}: bare except"
                if ast.unparse(node.type) in ("Exception", "BaseException"):
                    used = {inner.id for statement in node.body for inner in ast.walk(statement) if isinstance(inner, ast.Name)}
                    assert node.name in used or "traceback" in used, f"{file}:{node.lineno}: the error is lost"
