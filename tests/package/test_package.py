"""What is published: built, installed in an environment of its own, run and type-checked as a user would."""

import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import randes

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PROGRAM = HERE / "user_program.py"
SKIPPED = "[mypy]\nstrict = true\ndisallow_subclassing_any = false\n[mypy-torch.*,numpy.*]\nfollow_imports = skip\n"
"""torch takes mypy half a minute, and is not what is checked."""
WRONG = {
    "randes.compress({}, {}, 3)": "arg-type",
    "randes.Superposition.load(b'store').names": "arg-type",
    "randes.Config(signs='left')": "arg-type",
    "randes.SuperposedModel.from_pretrained('base', 3)": "arg-type",
    "randes.load('store', capacity='8')": "arg-type",
    "randes.compres": "attr-defined",
}


def run(*command: object, cwd: Path) -> str:
    ran = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is made of that alone."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python in an environment that has the wheel, and what it depends on from here, but not this checkout."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, built[1], cwd=folder)
    packages = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip())
    # As lines of a .pth file, whose own .pth files, an editable installation among them, are not read.
    own = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "dependencies.pth").write_text("\n".join(own) + "\n")
    return python


def test_the_wheel_is_installed_and_used_as_the_guide_says(installed: Path, tmp_path: Path) -> None:
    version, where, names = run(installed, PROGRAM, cwd=tmp_path).splitlines()
    assert (version, names) == (randes.__version__, "['german', 'legal']")
    assert Path(where).is_relative_to(installed.parent.parent)
    assert "german" in run(installed, "-m", "randes", "info", "store", cwd=tmp_path)
    assert "from randes.cli import app" in (installed.parent / "randes").read_text("utf-8")


def test_a_users_program_is_type_checked_against_the_wheel(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mypy.ini").write_text(SKIPPED)
    check = (sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--python-executable", installed)
    (tmp_path / "program.py").write_text(PROGRAM.read_text("utf-8"))
    assert "Success" in run(*check, "program.py", cwd=tmp_path)
    (tmp_path / "wrong.py").write_text("import randes\n\n" + "\n".join(WRONG))
    ran = subprocess.run([*map(str, check), "wrong.py"], cwd=tmp_path, capture_output=True, text=True)
    found = {int(line): code for line, code in re.findall(r"wrong\.py:(\d+): error: .*\[([\w-]+)\]", ran.stdout)}
    assert found == dict(enumerate(WRONG.values(), start=3)), ran.stdout + ran.stderr


def test_what_is_built_holds_what_it_should(built: tuple[Path, Path]) -> None:
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        about = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"randes", "randes_kernels", f"randes-{randes.__version__}.dist-info"}
    ours = {"randes": ROOT / "python_api" / "randes", "randes_kernels": ROOT / "randes_kernels"}
    for package, folder in ours.items():
        files = {f"{package}/{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file()}
        assert {name for name in files if "__pycache__" not in name} <= {*names}
    assert "randes/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for line in (f"Version: {randes.__version__}", "License-Expression: Apache-2.0", "Requires-Python: >=3.10"):
        assert line in about
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert held >= {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "tests/conftest.py"}


def test_the_version_stands_once() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == randes.__version__
    assert citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert paper["url"].endswith("2505.11204")
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == randes.__version__  # type: ignore[index]
    assert not re.search(r"^version\b", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)


def test_the_templates_and_hooks_can_be_read() -> None:
    for path in (*(ROOT / ".github" / "ISSUE_TEMPLATE").iterdir(), ROOT / ".pre-commit-config.yaml"):
        found = yaml.safe_load(path.read_text("utf-8"))
        assert isinstance(found, dict), path
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"][0]["hooks"]
    for hook in hooks:
        assert metadata.version(hook["entry"].split()[0]), "the tools are among the tests' dependencies"
