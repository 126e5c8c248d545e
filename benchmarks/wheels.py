"""A bundle of wheels for a GPU machine that has torch and triton, but no network; in pieces of less than 60 MiB.

    python benchmarks/wheels.py make DIR [--package megatron-core==0.19.2 ...]
    python benchmarks/wheels.py join DIR TARGET

``make`` downloads wheels, without what they depend on, and writes DIR/wheels.000, wheels.001, ... and a checksum of
each. ``join``, on the other machine, checks the pieces and unpacks the wheels into TARGET:

    PYTHONPATH=TARGET python benchmarks/run.py --call 1

It needs nothing but Python. Programs that wheels would install are not: only what is imported.

By default the bundle is megatron-core alone, and the benchmarks' experts take torch's grouped matrix product.
Transformer Engine comes in three packages of one version: transformer_engine, its core transformer_engine_cu13, which
makes the bundle larger than a piece, and transformer_engine_torch. The last is published as source alone, to be
compiled against one torch and one CUDA. Megatron does not start where it finds only the other two, so ``make`` asks for
all of them. Build the wheel on a machine with the GPU machine's Python, torch and major version of CUDA. That needs
a C++ compiler, the headers of CUDA, cuDNN and NCCL, and time for 33 files, but no GPU.

    pip install transformer_engine_cu13==2.20.2 pybind11 ninja
    pip wheel --no-deps --no-build-isolation --wheel-dir BUILT transformer_engine_torch==2.20.2
    python benchmarks/wheels.py make DIR --package megatron-core==0.19.2 transformer_engine==2.20.2 \\
        transformer_engine_cu13==2.20.2 BUILT/transformer_engine_torch-2.20.2-*.whl
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PIECE_BYTES = 59 * 2**20
PACKAGES = ("megatron-core==0.19.2",)
CHECKSUMS = "wheels.sha256"
# pip takes a platform by its exact name.
PLATFORMS = [f"manylinux_2_{glibc}_x86_64" for glibc in range(17, 40)] + ["manylinux2014_x86_64", "linux_x86_64"]


class BundleError(Exception):
    """What is wrong with a bundle, for its user."""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download(packages: list[str], python_version: str, folder: Path) -> None:
    """The wheels of ``packages``, which are names or wheel files, without what they depend on."""
    files = [package for package in packages if package.endswith(".whl")]
    for file in files:
        shutil.copy(file, folder)
    if names := [package for package in packages if package not in files]:
        platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
        options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python_version]
        command = [sys.executable, "-m", "pip", "download", "-q", *options, *platforms, "--dest", str(folder), *names]
        if subprocess.run(command).returncode:
            raise BundleError("pip found no wheel for one of them, or failed; its message is above")


def check_transformer_engine(wheels: list[Path]) -> None:
    """Raises BundleError where there is half of it: worse than nothing."""
    found = {wheel.name.split("-")[0] for wheel in wheels}
    parts = {name for name in found if name.startswith("transformer_engine")}
    if parts and not ({"transformer_engine", "transformer_engine_torch"} <= parts and len(parts) == 3):
        raise BundleError(
            f"of Transformer Engine only {', '.join(sorted(parts))}: Megatron would not start with it. It takes "
            "transformer_engine, transformer_engine_cu13 (or _cu12) and a built wheel of transformer_engine_torch"
        )


def split(wheels: list[Path], folder: Path, piece_bytes: int = PIECE_BYTES) -> list[Path]:
    """One archive of the wheels, cut into numbered pieces; their checksums beside them, as sha256sum writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("wheels.*"):
        old.unlink()
    pieces = []
    with tempfile.TemporaryFile(dir=folder) as archive:
        # Wheels are compressed already.
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for wheel in sorted(wheels):
                tar.add(wheel, wheel.name)
        archive.seek(0)
        while data := archive.read(piece_bytes):
            pieces.append(folder / f"wheels.{len(pieces):03}")
            pieces[-1].write_bytes(data)
    (folder / CHECKSUMS).write_text("".join(f"{sha256(piece)}  {piece.name}\n" for piece in pieces))
    return pieces


def join(folder: Path, target: Path) -> list[str]:
    """Checks the pieces and unpacks their wheels into ``target``; returns the wheels' names.

    Raises:
        BundleError: pieces are missing or damaged; the message names them.
    """
    if not (folder / CHECKSUMS).exists():
        raise BundleError(f"{folder / CHECKSUMS} is missing: it names the pieces")
    sums = [line.split() for line in (folder / CHECKSUMS).read_text().splitlines()]
    if missing := [name for _, name in sums if not (folder / name).exists()]:
        raise BundleError(f"missing in {folder}: {', '.join(missing)}")
    if damaged := [name for checksum, name in sums if sha256(folder / name) != checksum]:
        raise BundleError(f"damaged, to be copied again: {', '.join(damaged)}")
    target.mkdir(parents=True, exist_ok=True)
    names = []
    with tempfile.TemporaryFile(dir=target) as archive:
        for _, name in sums:
            with (folder / name).open("rb") as piece:
                shutil.copyfileobj(piece, archive)
        archive.seek(0)
        with tarfile.open(fileobj=archive) as tar:
            for member in tar:
                with zipfile.ZipFile(tar.extractfile(member)) as wheel:
                    wheel.extractall(target)
                names.append(member.name)
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="download wheels and cut them into pieces")
    make.add_argument("folder", type=Path, metavar="DIR")
    make.add_argument("--package", nargs="+", default=PACKAGES, help="names with or without version, or wheel files")
    make.add_argument("--python-version", default="3.12", help="of the other machine (%(default)s)")
    joining = commands.add_parser("join", help="check the pieces and unpack their wheels")
    joining.add_argument("folder", type=Path, metavar="DIR")
    joining.add_argument("target", type=Path, metavar="TARGET")
    arguments = parser.parse_args()
    try:
        if arguments.command == "join":
            for name in join(arguments.folder, arguments.target):
                print(f"unpacked {name}")
            print(f"PYTHONPATH={arguments.target.resolve()}")
            return 0
        with tempfile.TemporaryDirectory() as downloads:
            download(list(arguments.package), arguments.python_version, Path(downloads))
            wheels = list(Path(downloads).glob("*.whl"))
            for wheel in wheels:
                print(f"{wheel.stat().st_size / 2**20:7.1f} MiB {wheel.name}")
            check_transformer_engine(wheels)
            pieces = split(wheels, arguments.folder)
        print(f"{len(pieces)} pieces and {CHECKSUMS} in {arguments.folder}")
    except BundleError as error:
        print(f"wheels.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
