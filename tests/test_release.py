"""A release, up to the upload and through it: the distribution, its check, and what uploads it."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import yaml
from huggingface_hub import ModelCard

import mmdlm

ROOT = Path(__file__).parents[1]
CARDS = sorted((ROOT / "mmdlm/checkpoints").glob("*/README.md"))
ADDRESS = "https://example.org/owner/name"


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment | {"NO_COLOR": "1", "TWINE_NON_INTERACTIVE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def release() -> ModuleType:
    """The module that the workflow calls."""
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci/release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def source(project_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that what was built before cannot slip in."""
    folder = tmp_path_factory.mktemp("source")
    for path in project_files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return folder


@pytest.mark.slow
class TestDistribution:
    @pytest.fixture(scope="class")
    @classmethod
    def dist(cls, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Both distributions of a tag, as the workflow builds them: the wheel from the sdist."""
        pytest.importorskip("build", reason="build is not installed")
        folder = tmp_path_factory.mktemp("dist")
        tag = f"v{mmdlm.__version__}"
        text = (source / "CHANGELOG.md").read_text()
        (source / "CHANGELOG.md").write_text(  # as it is when a tag is set
            re.sub(r"(## \[Unreleased\]\n).*?(?=^## \[)", r"\1\n", text, flags=re.M | re.S)
        )
        checked = run(".ci/release.py", "--tag", tag, "--repository", ADDRESS, cwd=source)
        assert checked.returncode == 0, checked.stderr
        built = run("-m", "build", "--no-isolation", "--outdir", str(folder), cwd=source)
        assert built.returncode == 0, built.stderr
        return folder

    def test_the_check_of_the_index(self, dist: Path) -> None:
        pytest.importorskip("twine", reason="twine is not installed")
        found = sorted(path.name for path in dist.iterdir())
        name = f"mmdlm-{mmdlm.__version__}"
        assert found == [f"{name}-py3-none-any.whl", f"{name}.tar.gz"]
        checked = run("-m", "twine", "check", "--strict", *map(str, dist.iterdir()), cwd=dist)
        assert checked.returncode == 0, checked.stdout
        assert checked.stdout.count("PASSED") == 2

    def test_the_page_of_the_index_leads_to_the_repository(self, dist: Path) -> None:
        (wheel,) = dist.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (one for one in archive.namelist() if one.endswith("METADATA"))
            page = archive.read(name).decode()
        tag = f"v{mmdlm.__version__}"
        assert f'src="{ADDRESS}/raw/{tag}/.github/media/denoising.gif"' in page
        assert f"]({ADDRESS}/blob/{tag}/LICENSE)" in page
        links = re.findall(r"\]\(([^)\s]+)", page)
        assert links
        assert all(link.startswith(("https://", "#")) for link in links)

    def test_licenses_are_inside(self, dist: Path) -> None:
        (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
        wanted = {
            path.relative_to(ROOT).as_posix()
            for path in [ROOT / "LICENSE", *ROOT.glob("mmdlm/checkpoints/*/licenses/*")]
        }
        with zipfile.ZipFile(wheel) as archive:
            inside = {
                name.partition(".dist-info/licenses/")[2]
                for name in archive.namelist()
                if ".dist-info/licenses/" in name
            }
        assert inside == wanted
        with tarfile.open(sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        assert wanted <= names
        assert not any(name.startswith("tests") for name in names)

    def test_the_upload(self, dist: Path) -> None:
        """By the library that the workflow's last step runs, to an index of our own."""
        pytest.importorskip("twine", reason="twine is not installed")

        class Index(BaseHTTPRequestHandler):
            uploads: ClassVar[list[bytes]] = []

            def do_POST(self) -> None:
                self.uploads.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None: ...

        server = HTTPServer(("127.0.0.1", 0), Index)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            done = run(
                *["-m", "twine", "upload", "--disable-progress-bar"],
                *["--repository-url", f"http://127.0.0.1:{server.server_port}/legacy/"],
                *["--username", "__token__", "--password", "none", *map(str, dist.iterdir())],
                cwd=dist,
            )
        finally:
            server.shutdown()
            server.server_close()
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(Index.uploads) == 2
        for upload in Index.uploads:
            assert b'name="license_expression"\r\n\r\nApache-2.0\r\n' in upload
            assert b'name="description_content_type"\r\n\r\ntext/markdown\r\n' in upload


class TestTag:
    @pytest.fixture
    def tree(self, tmp_path: Path) -> Path:
        (tmp_path / "mmdlm").mkdir()
        (tmp_path / "mmdlm/__init__.py").write_text('__version__ = "1.2.0"\n')
        (tmp_path / "CITATION.cff").write_text("title: x\nversion: 1.2.0\n")
        (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [1.2.0] - 2026-12-01\n")
        return tmp_path

    def test_one_that_may_be_released(self, release: ModuleType, tree: Path) -> None:
        assert release.problems(tree, "v1.2.0") == []

    @pytest.mark.parametrize(
        "file, text, says",
        [
            ("mmdlm/__init__.py", '__version__ = "1.3.0"\n', "the tag is v1.2.0, but"),
            ("CITATION.cff", "version: 1.1.0\n", "CITATION.cff has the version 1.1.0, not 1.2.0"),
            ("CITATION.cff", "title: x\n", "CITATION.cff has the version None"),
            ("CHANGELOG.md", "## [1.1.0] - 2026-11-30\n", "has no section [1.2.0] with a date"),
            (
                "CHANGELOG.md",
                "## [Unreleased]\n\n- New.\n\n## [1.2.0] - 2026-12-01\n",
                "has unreleased changes; move them to [1.2.0]",
            ),
        ],
    )
    def test_ones_that_may_not(
        self, release: ModuleType, tree: Path, file: str, text: str, says: str
    ) -> None:
        (tree / file).write_text(text)
        assert says in "\n".join(release.problems(tree, "v1.2.0"))

    def test_the_version_stands_in_one_place(self, release: ModuleType) -> None:
        """What repeats it, for those who cite, says the same."""
        assert release.version(ROOT) == mmdlm.__version__
        cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
        assert str(cited["version"]) == mmdlm.__version__

    def test_links(self, release: ModuleType) -> None:
        text = '[a](docs/a.md#b) [c](#d) [e](https://f) ![g](h.png) <img src="i.gif"> [j](mailto:k)'
        assert release.absolute(text, f"{ADDRESS}/", "v1") == (
            f"[a]({ADDRESS}/blob/v1/docs/a.md#b) [c](#d) [e](https://f) "
            f"![g]({ADDRESS}/raw/v1/h.png)"
            f' <img src="{ADDRESS}/raw/v1/i.gif"> [j](mailto:k)'
        )


class TestWorkflow:
    @pytest.fixture
    def workflow(self) -> dict[Any, Any]:
        return dict(yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text()))

    def test_only_a_tag_is_uploaded(self, workflow: dict[Any, Any]) -> None:
        assert workflow[True]["push"] == {"tags": ["v[0-9]*"]}  # YAML reads `on` as true
        publish = workflow["jobs"]["publish"]
        assert publish["needs"] == "build"
        assert "github.event_name == 'push'" in publish["if"]
        assert publish["environment"] == "pypi"

    def test_only_the_upload_may_ask_for_a_token(self, workflow: dict[Any, Any]) -> None:
        assert workflow["permissions"] == {"contents": "read"}
        assert workflow["jobs"]["publish"]["permissions"] == {"id-token": "write"}
        assert "permissions" not in workflow["jobs"]["build"]
        assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()
        assert not any("run" in step for step in workflow["jobs"]["publish"]["steps"])

    def test_names_of_tags_are_no_part_of_a_script(self, workflow: dict[Any, Any]) -> None:
        for job in workflow["jobs"].values():
            for step in job["steps"]:
                assert "${{" not in step.get("run", "")


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_cards_of_bundled_models(path: Path) -> None:
    """The Hub reads the card, and each license that it links to lies in the wheel."""
    card = ModelCard.load(path)
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "mmdlm"
    assert card.data.pipeline_tag
    links = re.findall(r"\]\((licenses/[^)]+)\)", card.text)
    held = {f"licenses/{one.name}" for one in (path.parent / "licenses").iterdir()}
    assert links
    assert set(links) == held
    for link in links:
        assert len((path.parent / link).read_text(encoding="utf-8")) > 1000


def test_the_first_notebook_needs_no_checkout() -> None:
    """It installs the wheel where that is missing, as in Colab, and imports nothing beside it."""
    notebook = json.loads((ROOT / "docs/tutorials/draw-and-caption.ipynb").read_text())
    code = ["".join(one["source"]) for one in notebook["cells"] if one["cell_type"] == "code"]
    assert "find_spec" in code[0]
    assert '"install"' in code[0]
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for cell in code
        for node in ast.walk(ast.parse(cell))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported <= {"mmdlm", "torch", "PIL", *sys.stdlib_module_names}
