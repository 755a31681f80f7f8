"""Generate the Python side of the contracts from proto/dante/v1 into src/dantegpu/contracts/gen.

    python scripts/gen_proto.py           write the generated code
    python scripts/gen_proto.py --check   exit 1 and name the files that differ from what would be written

The generated code is checked in, so that a clone runs without protoc; `--check` is what keeps it honest.
Stubs are made for `grpc.aio` only: nothing in DanteGPU talks blocking gRPC.
"""

import argparse
import importlib.resources
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PROTO_DIR = REPOSITORY / "proto"
GENERATED_DIR = REPOSITORY / "src" / "dantegpu" / "contracts" / "gen"
PACKAGE_PREFIX = "dantegpu.contracts.gen"
DOCSTRING = '"""Generated from proto/ by scripts/gen_proto.py; do not edit."""\n'

# protoc writes imports relative to the proto root (`from dante.v1 import x_pb2`), but our package lies deeper.
_FROM_IMPORT = re.compile(r"^(\s*)from dante\.(v\d+)\b", re.MULTILINE)
_PLAIN_IMPORT = re.compile(r"^(\s*)import dante\.(v\d+)\b", re.MULTILINE)
_QUALIFIED_USE = re.compile(r"(?<![\w.\"'/])dante\.(v\d+)\.(\w+_pb2)\b")


class GenerationError(Exception):
    """protoc refused the protos; the message is its own output."""


def generate(target: Path) -> None:
    """Write the whole generated tree into the empty folder `target`.

    Raises GenerationError when a proto file is wrong or the tools are missing.
    """
    protos = sorted(path.relative_to(PROTO_DIR).as_posix() for path in PROTO_DIR.rglob("*.proto"))
    if not protos:
        raise GenerationError(f"no .proto files under {PROTO_DIR}")
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"--proto_path={PROTO_DIR}",
        f"--proto_path={well_known}",
        f"--python_out={target}",
        f"--grpc_python_out={target}",
        f"--mypy_out=quiet,readable_stubs:{target}",
        f"--mypy_grpc_out=quiet,readable_stubs,only_async:{target}",
        *protos,
    ]
    # The protoc-gen-mypy plug-ins lie beside the interpreter, which need not be on PATH.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise GenerationError(done.stderr.strip() or f"protoc ended with status {done.returncode}")
    for path in target.rglob("*.py*"):
        path.write_text(_rewrite_imports(path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in list(target.rglob("*_pb2_grpc.py*")):
        if not _has_service(path):
            path.unlink()
    for folder in [target, *(path for path in target.rglob("*") if path.is_dir())]:
        (folder / "__init__.py").write_text(DOCSTRING, encoding="utf-8")


def _rewrite_imports(text: str) -> str:
    text = _FROM_IMPORT.sub(rf"\1from {PACKAGE_PREFIX}.dante.\2", text)
    text = _PLAIN_IMPORT.sub(rf"\1import {PACKAGE_PREFIX}.dante.\2", text)
    return _QUALIFIED_USE.sub(rf"{PACKAGE_PREFIX}.dante.\1.\2", text)


def _has_service(grpc_file: Path) -> bool:
    """protoc writes a _pb2_grpc file for every proto; those without a service are empty shells."""
    text = grpc_file.with_suffix(".py").read_text(encoding="utf-8") if grpc_file.with_suffix(".py").exists() else ""
    return "class " in text


def differences(fresh: Path, checked_in: Path) -> list[str]:
    """Paths, relative to `checked_in`, that are missing, left over or different there."""
    wanted = {path.relative_to(fresh): path.read_bytes() for path in fresh.rglob("*") if path.is_file()}
    present = {
        path.relative_to(checked_in): path.read_bytes()
        for path in checked_in.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return sorted(str(path) for path in wanted.keys() | present.keys() if wanted.get(path) != present.get(path))


def main(arguments: list[str] | None = None) -> int:
    """Return 0 when the tree is (now) as generated, 1 when `--check` found a difference or protoc refused."""
    parser = argparse.ArgumentParser(description="Generate src/dantegpu/contracts/gen from proto/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when something would change")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        try:
            generate(fresh)
        except GenerationError as error:
            print(error, file=sys.stderr)
            return 1
        changed = differences(fresh, GENERATED_DIR)
        if options.check:
            for path in changed:
                print(f"{GENERATED_DIR.relative_to(REPOSITORY) / path} differs from proto/", file=sys.stderr)
            if changed:
                print("run scripts/gen_proto.py and commit what it writes", file=sys.stderr)
            return 1 if changed else 0
        # File by file, so that programs that run from this tree never see it empty.
        for path in changed:
            target = GENERATED_DIR / path
            if not (fresh / path).exists():
                target.unlink()
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fresh / path, target)
        print(f"{len(changed)} files written or removed" if changed else "already up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
