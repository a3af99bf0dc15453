"""`OnnxPredictor`: the inputs and results of predict, providers, threads, forks, other programs."""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cnnrnn
from cnnrnn import OnnxPredictor, ProviderError, export_onnx
from cnnrnn.cli import main
from tests.export.models import picture_model

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[2]
ON_GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def model():
    return picture_model()


@pytest.fixture(scope="module")
def file(pictures_file):
    return pictures_file


@pytest.fixture(scope="module", params=["onnx", "native"])
def predictor(request, file):
    return OnnxPredictor(file, search=request.param, threads=1)


@pytest.fixture(scope="module")
def arrays():
    random = np.random.default_rng(0)
    base = random.integers(0, 256, (17, 1, 1, 3))
    noise = random.integers(-60, 61, (17, 16, 16, 3))
    return (base + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, arrays):
    path = tmp_path_factory.mktemp("pictures")
    for number, array in enumerate(arrays):
        Image.fromarray(array).resize((20, 18)).save(path / f"{number:02}.png")
    return path


def answers(predictions):
    return [(p.source, p.error is None, p.labels) for p in predictions]


# As model.predict


@pytest.mark.parametrize("kind", ["array", "list", "tensor", "picture", "folder", "file"])
def test_every_kind_of_input(predictor, model, arrays, folder, kind):
    images = {
        "array": arrays,
        "list": list(arrays[:3]),
        "tensor": torch.from_numpy(arrays).permute(0, 3, 1, 2),
        "picture": Image.fromarray(arrays[0]),
        "folder": folder,
        "file": folder / "03.png",
    }[kind]
    found, expected = predictor.predict(images), model.predict(images)
    assert answers(found) == answers(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.log_prob == pytest.approx(theirs.log_prob, abs=1e-4)
        assert mine.scores == pytest.approx(theirs.scores, abs=1e-4)
        assert [path for path, _ in mine.paths] == [path for path, _ in theirs.paths]


@pytest.mark.parametrize(
    "options",
    [{"top_k": 1}, {"min_labels": 2}, {"decide": "threshold"}, {"decide": "k"},
     {"decide": "f1"}, {"decide": "f1", "min_labels": 1}, {"threshold": 2.0, "min_labels": 1},
     {"threshold": 0.1}, {"batch_size": 3}, {"workers": 0}, {"workers": 3, "batch_size": 2}],
    ids=str,
)  # fmt: skip
def test_options(predictor, model, arrays, options):
    assert answers(predictor.predict(arrays, **options)) == answers(
        model.predict(arrays, **options)
    )


def test_another_beam_is_for_the_compiled_search(file, model, arrays):
    compiled = OnnxPredictor(file, search="compiled", threads=1)
    found = compiled.predict(arrays, beam_size=2)
    assert answers(found) == answers(model.predict(arrays, beam_size=2))
    whole = OnnxPredictor(file, threads=1)
    assert whole.predict(arrays, beam_size=4)
    with pytest.raises(ValueError, match="beam_size is 4 in .*, got 2; export again"):
        whole.predict(arrays, beam_size=2)


def test_a_bad_picture_stops_nothing_that_skips_it(predictor, model, folder, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    images = [folder / "00.png", tmp_path / "broken.jpg", folder / "01.png"]
    found = predictor.predict(images, on_bad_image="skip")
    assert answers(found) == answers(model.predict(images, on_bad_image="skip"))
    with pytest.raises(cnnrnn.BadImageError, match="broken.jpg"):
        predictor.predict(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"on_bad_image": "ignore"}, "on_bad_image must be error or skip, got 'ignore'"),
        ({"decide": "guess"}, "decide must be one of .*, got 'guess'"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        (
            {"search_device": "cuda"},
            "search_device are not for .*, which ONNX Runtime runs: choose",
        ),
        ({"search_device": "cpu"}, "search_device are not for .*, which ONNX Runtime runs: choose"),
    ],
)
def test_options_that_do_not_fit(predictor, arrays, options, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(arrays, **options)


def test_float_pictures_need_a_file_that_takes_them(predictor):
    with pytest.raises(ValueError, match="takes uint8 pictures, got a float tensor"):
        predictor.predict(torch.rand(2, 3, 16, 16))
    with pytest.raises(ValueError, match="takes images, no feature vectors"):
        predictor.predict_features(torch.rand(2, 256))
    with pytest.raises(TypeError, match="images must be a path"):
        predictor.predict(7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": torch.zeros(2, 16, 16, 3)}, r"images must be uint8 \[batch, 16, 16, 3\], got "),
        ({"inputs": torch.zeros(2, 9, 16, 3, dtype=torch.uint8)}, r"got torch.uint8 \[2, 9, 16, 3"),
        ({"inputs": torch.zeros(16, 16, 3, dtype=torch.uint8)}, r"got torch.uint8 \[16, 16, 3"),
        ({"min_labels": 4}, "min_labels must be in 0..3, got 4"),
        ({"forbidden": torch.zeros(3, 6, dtype=torch.bool)}, r"forbidden must be bool \[1 or 2, 6"),
        ({"evidence": torch.zeros(3, 6, dtype=torch.int8)}, r"evidence must be \[1 or 2, 6\], got"),
        ({"evidence": torch.zeros(1, 6)}, "evidence must be int8, got torch.float32"),
        ({"evidence": torch.full((1, 6), 2, dtype=torch.int8)}, "got 2 for label 0 of image 0"),
        (
            {"evidence": torch.ones(2, 6, dtype=torch.int8)},
            "image 0 has 6 labels known to be presen",
        ),
        ({"forbidden": torch.zeros(1, 6)}, r"got torch.float32 \[1, 6\]"),
        ({"outputs": ["nothing"]}, "outputs must be among labels, .*, got 'nothing'"),
    ],
)
def test_what_the_graph_does_not_take(file, options, message):
    arguments = {"inputs": torch.zeros(2, 16, 16, 3, dtype=torch.uint8)} | options
    with pytest.raises(ValueError, match=message):
        OnnxPredictor(file, threads=1).run(**arguments)


def test_what_the_compiled_search_cannot_be_asked(file):
    compiled = OnnxPredictor(file, search="compiled", threads=1)
    images = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    assert set(compiled.run(images)) == {"joint", "label_scores"}
    with pytest.raises(ValueError, match="outputs must be among joint, label_scores, got 'labels'"):
        compiled.run(images, outputs=["labels"])
    for option in ({"min_labels": 1}, {"evidence": torch.zeros(1, 6, dtype=torch.int8)}):
        with pytest.raises(ValueError, match="forbidden and evidence need the search in the file"):
            compiled.run(images, **option)
    whole = OnnxPredictor(file, threads=1)
    other = replace(whole.search_config, order="unique")
    with pytest.raises(ValueError, match="search must be that of .* but for min_labels"):
        whole.infer(images, other)
    with pytest.raises(TypeError, match="inputs must be a tensor, got ndarray"):
        whole.run(images.numpy())


def test_evidence_for_every_image(file):
    whole = OnnxPredictor(file, threads=1)
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5000, 16, 16, 3), dtype=torch.uint8, generator=random)
    evidence = -(torch.rand(5000, 6, generator=random) < 0.3).to(torch.int8)
    evidence[::3, 2] = 1
    found = whole.infer(images, evidence=evidence)  # in two slices
    sets, fits = found.sets, ~found.found_none()
    assert sets.any() and not (sets & (evidence == -1)).any() and fits.any()
    assert (sets | (evidence < 1))[fits].all()
    one = whole.infer(images[4500:4501], evidence=evidence[4500:4501])
    assert torch.equal(one.sets[0], sets[4500])
    torch.testing.assert_close(one.marginals[0], found.marginals[4500], equal_nan=True)


def test_pictures_that_are_not_finite_are_named(folder, tmp_path):
    model = picture_model()
    with torch.no_grad():
        model.head.image_projection.weight[0, 0] = torch.nan
    export_onnx(model, tmp_path / "spoilt.onnx", loop=True)
    for search in ("onnx", "compiled"):
        spoilt = OnnxPredictor(tmp_path / "spoilt.onnx", search=search, threads=1)
        with pytest.raises(ValueError, match="not finite for 2 images .*00.png, .*01.png"):
            spoilt.predict(folder, batch_size=2)


# Providers


def test_it_says_which_provider_runs(predictor):
    assert predictor.providers == ["CPUExecutionProvider"]


@pytest.mark.skipif(ON_GPU, reason="a GPU is there")
@pytest.mark.parametrize("name", ["cuda", "tensorrt", "CUDAExecutionProvider"])
def test_a_provider_that_cannot_start_is_an_error(file, name):
    with pytest.raises(ProviderError, match="ExecutionProvider (cannot start|is not in this)"):
        OnnxPredictor(file, providers=[name])
    with pytest.warns(UserWarning, match="; CPUExecutionProvider runs instead"):
        fallen_back = OnnxPredictor(file, providers=[name], fallback=True)
    assert fallen_back.providers == ["CPUExecutionProvider"]


def test_a_provider_that_is_not_there(file, monkeypatch):
    with pytest.raises(ProviderError, match="RocketExecutionProvider is not in this ONNX Runtime"):
        OnnxPredictor(file, providers=["RocketExecutionProvider", "cpu"])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(
        importlib.metadata, "distribution", lambda name: None
    )  # as if both were installed
    with pytest.raises(ProviderError, match="both installed and overwrite.*pip uninstall -y"):
        OnnxPredictor(file, providers=["cuda"])


@pytest.mark.parametrize("providers", [(), "cpu"])
def test_providers_are_a_list(file, providers):
    with pytest.raises(ValueError, match="providers must be a list of names"):
        OnnxPredictor(file, providers=providers)


@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_on_a_gpu(file, model, arrays, name):
    predictor = OnnxPredictor(file, providers=[name])
    assert answers(predictor.predict(arrays)) == answers(model.predict(arrays))
    images = torch.from_numpy(arrays).cuda()
    found = predictor.run(images)
    assert found["labels"].is_cuda
    assert torch.equal(found["labels"].cpu(), OnnxPredictor(file).run(images.cpu())["labels"])


# Threads and processes


def test_eight_threads_give_the_same_bits(file, arrays):
    predictor = OnnxPredictor(file, threads=2)
    images = torch.from_numpy(arrays[:3])
    expected = predictor.run(images)

    def repeat(_):
        for _ in range(300):
            found = predictor.run(images)
            if not all(torch.equal(found[name], expected[name]) for name in expected):
                return False
        return True

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(repeat, range(8)))


def largest_pause(work):
    """Run work in a thread; return its seconds and the longest this thread did not run."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: (work(), done.set()))
    began = last = time.perf_counter()
    longest = 0.0
    thread.start()
    while not done.is_set():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
        time.sleep(0.001)
    thread.join()
    return time.perf_counter() - began, longest


def test_the_gil_is_free_while_a_session_or_a_search_runs(file, arrays):
    images = torch.from_numpy(arrays).repeat(200, 1, 1, 1)
    predictor = OnnxPredictor(file, threads=1)
    seconds, pause = largest_pause(lambda: predictor.run(images))
    assert pause < 0.5 * seconds, f"{pause:.3f} of {seconds:.3f} s"
    head = cnnrnn.Head(80, 8, hidden_dim=64).eval()
    with torch.no_grad():
        embedding = head.embed(torch.randn(20_000, 8))
    config = cnnrnn.SearchConfig(beam_size=8, max_labels=8)
    seconds, pause = largest_pause(lambda: cnnrnn.beam_search(head, embedding, config))
    assert pause < 0.5 * seconds, f"{pause:.3f} of {seconds:.3f} s"


FORKED = """
import os, sys, time, warnings
import numpy as np, torch
import cnnrnn
warnings.simplefilter("ignore")  # Python's own, of forks with threads
torch.set_num_threads(2)
pictures = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)
model = cnnrnn.load()
expected = [p.labels for p in model.predict(pictures)]
predictor = cnnrnn.OnnxPredictor(sys.argv[1], threads=2)
small = torch.zeros(4, 16, 16, 3, dtype=torch.uint8)
predictor.run(small)
child = os.fork()
if child == 0:
    same = [p.labels for p in model.predict(pictures)] == expected
    floats = torch.rand(2, 3, 600, 600)  # resized before anything else
    same &= len(model.predict(iter(floats))) == 2
    began = time.perf_counter()
    try:
        predictor.run(small)
    except RuntimeError as error:
        told = "open the OnnxPredictor in the child" in str(error)
    soon = time.perf_counter() - began < 1
    opened = cnnrnn.OnnxPredictor(sys.argv[1], threads=2)
    same &= len(opened.predict(list(small.numpy()) * 16)) == 64
    os._exit(0 if same and told and soon else 1)
for _ in range(300):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.1)
os.kill(child, 9)
sys.exit("the child waits for ever")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_a_fork_predict_works_and_a_session_says_what_to_do(file):
    run = subprocess.run(
        [sys.executable, "-c", FORKED, str(file)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


CLOSED = """
import sys
def no_network(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(no_network)
import numpy as np
import cnnrnn
pictures = np.zeros((2, 64, 64, 3), np.uint8)
cnnrnn.predict(pictures)
cnnrnn.OnnxPredictor(sys.argv[1]).predict(pictures)
print("no connection")
"""


def test_import_and_predict_open_no_connection(file):
    run = subprocess.run(
        [sys.executable, "-c", CLOSED, str(file)], capture_output=True, text=True, timeout=120
    )
    assert run.stdout == "no connection\n", run.stderr


# The command line


def test_the_command_line(tmp_path, model, folder, capsys):
    model.save(tmp_path / "checkpoint")
    out = tmp_path / "model.onnx"
    arguments = ["export", str(tmp_path / "checkpoint"), str(out), "--loop", "--beam-size", "3"]
    arguments += ["--max-known", "1", "--marginal-places", "5"]
    assert main([*arguments, "--max-labels", "2"]) == 0
    written = OnnxPredictor(out)
    assert (written.max_known, written.search_config.places(marginals=True)) == (1, 5)
    assert capsys.readouterr().out.startswith(f"{out}: ")
    common = ["predict", str(folder), "--format", "jsonl", "--device", "cpu"]
    for search in ("onnx", "native", "compiled"):  # the last one is a former name
        assert main([*common, "--model", str(out), "--search", search]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        expected = model.predict(folder, beam_size=3)
        name = model.labels[0]
        known = ["--model", str(out), "--search", search, "--known", name]
        assert main([*common, *known]) == 0
        answered = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert all(name in row["labels"] for row in answered) and len(answered) == len(expected)
        assert [row["image"] for row in rows] == [p.source for p in expected]
        assert all(len(row["labels"]) <= 2 for row in rows)
    assert main(["export", str(tmp_path / "nothing"), str(out)]) == 1
    assert "nothing is not a checkpoint" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "no" / "x.onnx")]) == 1
    assert "must be in a folder that exists" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "model")]) == 1
    assert "must be a file that ends in .onnx" in capsys.readouterr().err
    for option in (["--precision", "bf16"], ["--compiled"], ["--search_device", "cuda"]):
        assert main([*common, "--model", str(out), *option]) == 1
        assert f"{option[0]} does not apply to" in capsys.readouterr().err
    assert main([*common, "--model", str(tmp_path / "checkpoint"), "--search", "compiled"]) == 1
    assert "--search is only for FILE.onnx" in capsys.readouterr().err
    for device in ("cuda:x", "banana"):
        assert main([*common, "--model", str(out), "--device", device]) == 1
        assert "--device must be auto, cpu, cuda or cuda:N, got" in capsys.readouterr().err
    assert main([*common, "--model", str(tmp_path / "no.onnx")]) == 1
    assert "must be an ONNX file of cnnrnn export, found nothing there" in capsys.readouterr().err
