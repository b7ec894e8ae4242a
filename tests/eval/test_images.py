"""Images measured: the numbers of torch-fidelity's own command, layouts of scorers, resuming."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from eval.images import drawing, features
from eval.images.drawing import Drawn, draw, tiled
from eval.images.layouts import items_of
from eval.images.scoring import keep, read_reference, score
from mmdlm.rl.reward import Rubric

FEW = Drawn(num_inference_steps=2, batch_size=4)


def put(folder: Path, count: int, *, seed: int, size: int = 32) -> Path:
    """A folder of images of noise, which no two networks see alike."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        levels = random.integers(0, 256, (size, size, 3)).astype(np.uint8)
        Image.fromarray(levels).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library's network with random weights, in a file as it reads them."""
    fidelity = pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    with mock.patch.object(torch.nn.Module, "load_state_dict"):
        network = fidelity.utils.create_feature_extractor(
            features.EXTRACTOR,
            [features.POOLED],
            cuda=False,
            feature_extractor_weights_path=str(path),
            verbose=False,
        )
    state = network.state_dict()
    for name in state:  # what is left is zero or one by default
        if name.endswith("running_var"):
            state[name].uniform_(0.5, 1.5)
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("images")
    return put(place / "made", 7, seed=0), put(place / "real", 6, seed=1)


@pytest.fixture(scope="module")
def theirs(folders: tuple[Path, Path], weights: Path) -> dict[str, float]:
    """What the library's own command prints of the same folders."""
    made, real = folders
    options = ["--isc", "--fid", "--kid", "--cpu", "--json", "--silent", "--no-cache"]
    options += ["--feature-extractor-weights-path", str(weights)]
    options += ["--kid-subset-size", "5", "--kid-subsets", "3", "--isc-splits", "2"]
    options += ["--batch-size", "4", "--save-cpu-ram"]
    given = ["--input1", str(made), "--input2", str(real)]
    code = "import sys; from torch_fidelity.fidelity import main; main()"
    command = [sys.executable, "-c", code, *given, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout[done.stdout.index("{") :]))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of features, for all tests."""
    return tmp_path_factory.mktemp("features")


@pytest.mark.slow
class TestFidelity:
    @pytest.fixture
    def scored(self, weights: Path, kept: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
        def run(images: Path, reference: Path | None) -> dict[str, Any]:
            out = tmp_path / "report.json"
            score(
                images,
                out,
                reference=reference,
                weights=weights,
                cache=kept,
                isc_splits=2,
                kid_subsets=3,
                kid_subset_size=5,
                batch_size=4,
                device="cpu",
            )
            return dict(json.loads(out.read_text()))

        return run

    def test_numbers_are_those_of_the_library(self, scored, folders, theirs) -> None:
        report = scored(*folders)
        ours = report["results"]
        for name in ("inception_score", "kernel_inception_distance"):
            assert ours[name]["value"] == theirs[f"{name}_mean"]
            assert ours[name]["error"] == theirs[f"{name}_std"]
        assert ours["frechet_inception_distance"]["value"] == theirs["frechet_inception_distance"]
        assert report["images"]["images"] == 7

    def test_statistics_that_are_kept(
        self, scored, folders, weights, theirs, kept, tmp_path
    ) -> None:
        made, real = folders
        file = tmp_path / "real.npz"
        keep(real, file, weights=weights, cache=kept, batch_size=4, device="cpu")
        report = scored(made, file)
        distance = report["results"]["frechet_inception_distance"]["value"]
        assert distance == theirs["frechet_inception_distance"]
        assert report["reference"]["sha256"] == features.digest_of(features.image_files(real))
        with np.load(file) as arrays:
            np.savez(tmp_path / "bare.npz", mu=arrays["mu"], sigma=arrays["sigma"])
            notes = json.loads(str(arrays["mmdlm"])) | {"weights": "another"}
            np.savez(tmp_path / "other.npz", **{**arrays, "mmdlm": np.array(json.dumps(notes))})
        network = features.Network(weights, torch.device("cpu"), 4)
        whole, bare = (read_reference(one, network, kept) for one in (file, tmp_path / "bare.npz"))
        assert np.array_equal(whole.covariance, bare.covariance)
        assert whole.features is not None
        assert bare.features is None  # so that KID is left out
        with pytest.raises(ValueError, match="is of another network"):
            scored(made, tmp_path / "other.npz")
        with pytest.raises(ValueError, match=r"neither a folder of images nor a .npz file"):
            scored(made, weights)

    def test_what_is_known_is_not_computed_again(self, scored, folders, kept, monkeypatch) -> None:
        before = scored(folders[0], None)["results"]
        asked: list[int] = []
        whole = features.Network.features

        def counted(self: features.Network, files: Any) -> Any:
            asked.append(len(files))
            return whole(self, files)

        monkeypatch.setattr(features.Network, "features", counted)
        assert str(scored(folders[0], None)["results"]) == str(before)
        assert not asked
        for path in kept.iterdir():
            path.write_bytes(path.read_bytes()[:-8])  # damaged: computed again
        after = scored(folders[0], None)["results"]
        assert asked == [7]
        assert str(after) == str(before)

    def test_weights_that_are_none(self, folders, tmp_path) -> None:
        (tmp_path / "a.pth").write_bytes(b"PK")
        torch.save({"a": torch.zeros(1)}, tmp_path / "b.pth")
        for name, says in (
            ("a.pth", "is no state dict of torch"),
            ("b.pth", "does not hold inception-v3-compat"),
            ("c.pth", "no such file; download weights-inception"),
        ):
            with pytest.raises(ValueError, match=says):
                score(folders[0], tmp_path / "r.json", weights=tmp_path / name, device="cpu")


class TestLayouts:
    """The names are those that the scorers of the benchmarks read."""

    def test_geneval(self, tmp_path: Path) -> None:
        row = {
            "tag": "two_object",
            "include": [{"class": "bench", "count": 1}],
            "prompt": "a bench",
        }
        (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(row) + "\n")
        (item,) = items_of("geneval", tmp_path / "evaluation_metadata.jsonl", None)
        assert item.files == tuple(f"00000/samples/{k:05d}.png" for k in range(4))
        assert all(re.match(r"\d+\.png", Path(name).name) for name in item.files)
        assert item.notes == {"00000/metadata.jsonl": row}

    def test_dpg_bench(self, tmp_path: Path) -> None:
        (tmp_path / "COCOval2014000000001522.txt").write_text("A long prompt.\n")
        (item,) = items_of("dpg_bench", tmp_path, None)
        assert (item.files, item.count) == (("COCOval2014000000001522.png",), 4)
        with pytest.raises(ValueError, match="5 images of a prompt"):
            items_of("dpg_bench", tmp_path, 5)

    def test_tiles_lie_where_they_are_cut(self) -> None:
        colors = ["red", "lime", "blue", "white"]
        sheet = tiled([Image.new("RGB", (4, 4), color) for color in colors])
        boxes = [(0, 0, 4, 4), (4, 0, 8, 4), (0, 4, 4, 8), (4, 4, 8, 8)]  # as the scorer cuts
        cut = [sheet.crop(box).getpixel((1, 1)) for box in boxes]
        assert cut == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]

    def test_t2i_compbench(self, tmp_path: Path) -> None:
        (tmp_path / "color_val.txt").write_text("a red car\na green bench\ta blue bowl\n")
        first, second = items_of("t2i_compbench", tmp_path / "color_val.txt", 2)
        assert first.files == ("samples/a red car_000000.png", "samples/a red car_000001.png")
        name = Path(second.files[1]).name
        assert (name.split("_")[0], int(name.split("_")[-1].split(".")[0])) == ("a green bench", 3)

    def test_wise_and_imgedit(self, tmp_path: Path) -> None:
        rows = [{"Prompt": "a food", "Explanation": "b", "Subcategory": "c", "prompt_id": 7}]
        (tmp_path / "wise.json").write_text(json.dumps(rows))
        (item,) = items_of("wise", tmp_path / "wise.json", None)
        assert (item.prompt, item.files) == ("a food", ("7.png",))
        edits = {"1082": {"id": "animal/1.jpg", "prompt": "make it night", "edit_type": "style"}}
        (tmp_path / "basic_edit.json").write_text(json.dumps(edits))
        (item,) = items_of("imgedit", tmp_path / "basic_edit.json", None)
        assert (item.source, item.files) == ("animal/1.jpg", ("1082.png",))
        with pytest.raises(ValueError, match="count is 2, but the scorer of ImgEdit reads one"):
            items_of("imgedit", tmp_path / "basic_edit.json", 2)

    @pytest.mark.parametrize(
        "layout, name, text, says",
        [
            ("prompts", "a.txt", " \n", "holds no prompts"),
            ("prompts", "a.jsonl", '{"text": "x"}\n', "has no 'prompt'"),
            ("t2i_compbench", "a.txt", "red/blue\n", "has / or _"),
            (
                "wise",
                "a.json",
                '[{"Prompt": "a", "prompt_id": "../x"}]',
                "is outside of the folder",
            ),
            ("imgedit", "a.json", "[]", "is no object of edits"),
            ("imgedit", "a.json", '{"1": {"id": "a"}}', "an edit has no prompt and id"),
        ],
    )
    def test_lists_that_are_none(
        self, tmp_path: Path, layout: str, name: str, text: str, says: str
    ) -> None:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=says):
            items_of(layout, tmp_path / name, None)
        with pytest.raises(ValueError, match="no such file"):
            items_of(layout, tmp_path / "gone", None)


@pytest.mark.slow
class TestDrawing:
    @pytest.fixture
    def prompts(self, tmp_path: Path) -> Path:
        (tmp_path / "prompts.txt").write_text("red heart\nrocket\n\npizza\n")
        return tmp_path / "prompts.txt"

    def test_what_is_there_stays_and_the_rest_is_the_same(
        self, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draw(tmp_path / "whole", prompts, count=2, drawn=FEW, device="cpu")
        images = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
        assert sorted(images) == [f"{n:06d}_{k}.png" for n in range(3) for k in range(2)]
        (tmp_path / "whole/000002_1.png").unlink()  # as after a kill
        calls: list[int] = []
        write = drawing._write
        monkeypatch.setattr(
            drawing, "_write", lambda out, block, made: (calls.append(1), write(out, block, made))
        )
        draw(tmp_path / "whole", prompts, count=2, drawn=FEW, device="cpu")
        assert {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()} == images
        assert len(calls) == 1
        with pytest.raises(ValueError, match="was drawn with another drawn .* name another --out"):
            draw(tmp_path / "whole", prompts, count=2, drawn=Drawn(seed=1), device="cpu")

    def test_processes_share_the_prompts(
        self, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        few = Drawn(num_inference_steps=2, batch_size=1)
        draw(tmp_path / "one", prompts, drawn=few, device="cpu")
        monkeypatch.setenv("WORLD_SIZE", "2")
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            draw(tmp_path / "two", prompts, drawn=few, device="cpu")
        one, two = (
            {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
            for name in ("one", "two")
        )
        assert one == two
        assert len(one) == 3

    def test_geneval_from_the_model_on(self, tmp_path: Path) -> None:
        (tmp_path / "m.jsonl").write_text(json.dumps({"tag": "color", "prompt": "red heart"}))
        draw(tmp_path / "out", tmp_path / "m.jsonl", layout="geneval", drawn=FEW, device="cpu")
        found = sorted(
            str(one.relative_to(tmp_path / "out"))
            for one in (tmp_path / "out").rglob("*")
            if one.is_file()
        )
        samples = [f"00000/samples/0000{k}.png" for k in range(4)]
        assert found == ["00000/metadata.jsonl", *samples]
        assert json.loads((tmp_path / "out/00000/metadata.jsonl").read_text())["tag"] == "color"

    def test_rewards_straight_from_a_model(self, prompts: Path, tmp_path: Path) -> None:
        def red(prompts: Any, completions: Any, **columns: Any) -> list[float]:
            return [float(np.asarray(one)[..., 0].mean()) for one in completions]

        score(
            tmp_path / "images",
            tmp_path / "report.json",
            prompts=prompts,
            model="emoji",
            drawn=FEW,
            rubric=Rubric({"red": red}),
            inception=False,
            device="cpu",
        )
        report = json.loads((tmp_path / "report.json").read_text())
        drawn = [np.asarray(Image.open(one)) for one in sorted((tmp_path / "images").iterdir())]
        assert report["results"]["red"]["value"] == pytest.approx(
            np.mean([levels[..., 0].mean() for levels in drawn])
        )
        assert report["drawn"]["prompts"] == ["red heart", "rocket", "pizza"]

    @pytest.mark.parametrize(
        "options, says",
        [
            ({"inception": False}, "nothing is measured"),
            ({"model": "emoji"}, "need the prompts"),
            ({"rubric": Rubric({"a": len}), "inception": False}, "need the prompts"),
        ],
    )
    def test_options_that_do_not_fit(
        self, tmp_path: Path, options: dict[str, Any], says: str
    ) -> None:
        with pytest.raises(ValueError, match=says):
            score(tmp_path, tmp_path / "r.json", device="cpu", **options)
