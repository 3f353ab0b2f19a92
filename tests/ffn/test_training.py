"""Training: it learns, it is reproducible, it resumes bit for bit, and says what is wrong."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ffn import checkpoint, training
from ffn.config import override, preset
from ffn.data.store import SkeletonSet
from ffn.errors import FFNError
from ffn.evaluation import evaluate
from ffn.inference import FusedModel, write_fused
from ffn.scores import measure
from ffn.training import learning_rate, train, train_key
from tests.conftest import toy_recordings, write_set

SMALL = [
    "model.width=8", "model.depths=1,1", "clip.frames=12", "clip.persons=1", "clip.test_clips=2",
    "training.batch_size=6", "training.epochs=4", "training.lr=0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> SkeletonSet:
    arrays, labels = toy_recordings(36)
    return write_set(tmp_path_factory.mktemp("toys") / "set.arrow", arrays, "3d", labels=labels)


def run(data, folder: Path, *settings: str, **options) -> Path:
    config = override(preset("S4"), [*SMALL, *settings])
    options = {"protocol": "p", "stream": "j", "progress": False, "out": folder / "out", "state_dir": folder / "state", **options}
    return train(data, config=config, **options)


def test_it_learns_and_the_last_epoch_is_published(toys, tmp_path):
    epochs = []
    out = run(toys, tmp_path, "training.epochs=30", "loss.name=cross_entropy", on_epoch=epochs.append)
    assert [e.epoch for e in epochs] == list(range(1, 31))
    assert epochs[-1].loss < epochs[0].loss
    assert [record["epoch"] for record in checkpoint.read_history(out)] == list(range(1, 31))
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "history.json", "labels.json", "model.safetensors"]
    scores = evaluate(toys, out)
    assert measure(scores).top1 >= 0.75
    assert len(scores.ids) == 12
    np.testing.assert_allclose(scores.probabilities.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", ["ST-GCN++", "2s-AGCN", "AAGCN", "CTR-GCN", "MS-G3D"])
def test_a_rival_trains_resumes_and_is_evaluated(name, toys, tmp_path):
    small = [setting for setting in SMALL if setting != "model.depths=1,1"]
    config = override(preset(name), [*small, "training.epochs=2"])
    out, epochs = tmp_path / "out", []

    def stop(epoch):
        epochs.append(epoch.epoch)
        if epochs == [1]:
            raise Interrupted

    options = {"protocol": "p", "stream": "j", "config": config, "out": out, "state_dir": tmp_path, "progress": False}
    with pytest.raises(Interrupted):
        train(toys, on_epoch=stop, **options)
    train(toys, on_epoch=stop, **options)
    assert epochs == [1, 2]
    assert checkpoint.read_meta(out).config.model.network == config.model.network
    np.testing.assert_allclose(evaluate(toys, out).probabilities.sum(1), 1, rtol=1e-5)


class Interrupted(Exception):
    pass


def stop_after(number: int):
    def on_epoch(epoch):
        if epoch.epoch == number:
            raise Interrupted

    return on_epoch


def test_resumed_training_ends_with_the_same_weights(toys, tmp_path):
    settings = ("model.dropout=0.3", "clip.rotate=0.2")
    whole = run(toys, tmp_path / "whole", *settings)
    with pytest.raises(Interrupted):
        run(toys, tmp_path / "parts", *settings, on_epoch=stop_after(2))
    later = []
    parts = run(toys, tmp_path / "parts", *settings, on_epoch=later.append)
    assert [e.epoch for e in later] == [3, 4]
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    assert len(checkpoint.read_history(parts)) == 4


def test_a_finished_training_is_not_run_again(toys, tmp_path):
    run(toys, tmp_path)
    again = []
    run(toys, tmp_path, on_epoch=again.append, out=tmp_path / "other")
    assert again == []
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_seed_decides_the_weights(toys, tmp_path):
    first, same, other = (
        run(toys, tmp_path / name, f"training.seed={seed}", "training.epochs=1") for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert (first / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_every_epoch_samples_anew(toys):
    """A seed that repeats the same clips every epoch is the field's oldest mistake."""
    from ffn.config import ClipConfig
    from ffn.data.sampler import Sampler

    seen = []
    real = Sampler.train_clips

    def spy(self, index, draws):
        clips = real(self, index, draws)
        seen.append(dict(zip(index.tolist(), clips, strict=True)))
        return clips

    network = training.build(preset("S0").model, toys.layout, 3)
    sampler = Sampler.of(toys, "j", ClipConfig(frames=6, persons=1))
    config = override(preset("S0"), ["training.batch_size=100"])
    network.forward = lambda x: torch.zeros(len(x), 3, requires_grad=True)  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "train_clips", spy)
        for number in (1, 2):
            optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
            training.run_epoch(network, optimizer, sampler, np.arange(9), torch.zeros(36, dtype=torch.long), config, number)
    assert list(seen[0]) != list(seen[1]), "the order changes"
    assert not all(torch.equal(seen[0][row], seen[1][row]) for row in range(9)), "the frames change"


KILLED = """
    import sys
    from pathlib import Path
    import tests.ffn.test_training as t
    from ffn.data.store import SkeletonSet
    t.run(SkeletonSet.open(sys.argv[1]), Path(sys.argv[2]), "training.epochs=200",
          on_epoch=lambda epoch: print(epoch.epoch, flush=True))
"""


def test_sigkill_in_mid_epoch_loses_nothing(toys, tmp_path):
    """A process killed at an arbitrary moment leaves a state that can be gone on from."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(toys.path), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline()
    time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    config = override(preset("S4"), [*SMALL, "training.epochs=200"])
    [state] = (tmp_path / "state" / train_key(toys.digest, config, "p", "j")).glob("state.safetensors")
    later = []

    def remember(epoch):
        later.append(epoch.epoch)
        stop_after(6)(epoch)

    with pytest.raises(Interrupted):
        run(toys, tmp_path, "training.epochs=200", on_epoch=remember)
    assert 4 <= later[0] <= 6
    assert state.exists()


def test_broken_state_is_named(toys, tmp_path):
    run(toys, tmp_path)
    [state] = (tmp_path / "state").rglob("state.safetensors")
    whole = state.read_bytes()
    for broken in (whole[:100], whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1]), whole.replace(b"threads", b"threats", 1)):
        state.write_bytes(broken)
        with pytest.raises(FFNError, match=r"state\.safetensors: cannot go on"):
            run(toys, tmp_path)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ((), {"stream": "k"}, "unknown stream 'k'"),
        ((), {"protocol": "q"}, "no protocol 'q': expected one of p"),
        (("training.epochs=0",), {}, "training.epochs=0: expected at least 1"),
        (("training.batch_size=2",), {}, "training.batch_size=2: expected at least 4"),
        (("training.momentum=0",), {}, "training.momentum=0.0: expected more than 0"),
        (("training.warmup_epochs=4",), {}, "less than training.epochs"),
        (("model.dropout=1",), {}, "model.dropout=1.0: expected 0 or more and less than 1"),
        (("model.reduction=3",), {}, "a divisor of model.width"),
        (("model.width=12",), {}, "multiple of 8"),
        (("training.lr=-1",), {}, "positive"),
        (("training.lr=1e30",), {}, "lower training.lr"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(toys, tmp_path, settings, options, message):
    with pytest.raises(FFNError, match=message):
        run(toys, tmp_path, *settings, **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_not_replaced(toys, tmp_path):
    notes = tmp_path / "out" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    with pytest.raises(FFNError, match=r"holds notes\.txt, which would be lost"):
        run(toys, tmp_path)
    assert notes.read_text() == "mine"
    notes.unlink()
    run(toys, tmp_path, "training.epochs=1")
    run(toys, tmp_path, "training.epochs=2")
    assert len(checkpoint.read_history(tmp_path / "out")) == 2


def test_one_training_at_a_time(toys, tmp_path):
    config = override(preset("S4"), SMALL)
    lock = tmp_path / "state" / train_key(toys.digest, config, "p", "j") / "lock"
    with training.locked(lock), pytest.raises(FFNError, match="going on in another process"):
        run(toys, tmp_path)
    run(toys, tmp_path)


def test_a_resumed_training_takes_the_threads_it_began_with(toys, tmp_path):
    with pytest.raises(Interrupted):
        run(toys, tmp_path, on_epoch=stop_after(2))
    seen = []
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        run(toys, tmp_path, on_epoch=lambda _: seen.append(torch.get_num_threads()))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert seen == [before, before]


def test_learning_rate_warms_up_and_ends_at_zero():
    recipe = override(preset("S0"), ["training.epochs=10", "training.warmup_epochs=2", "training.lr=1"]).training
    rates = [learning_rate(recipe, step=step, steps_per_epoch=5) for step in range(50)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1
    assert rates[-1] < 0.005
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) < 0.1


def test_trying_the_compiler_changes_nothing(toys, tmp_path, monkeypatch):
    """Both sizes of batch are tried before the first step; statistics and gradients of that are forgotten."""
    tried = []

    class Spy(torch.nn.Module):
        def __init__(self, network, **options):
            super().__init__()
            self.network, self.options = network, options

        def forward(self, clips):
            tried.append((clips.shape[0], self.options["dynamic"]))
            return self.network(clips)

    settings = ("training.epochs=1", "training.batch_size=5", "model.dropout=0.3")
    eager = run(toys, tmp_path / "eager", *settings)
    monkeypatch.setattr(torch, "compile", Spy)
    monkeypatch.setenv("FFN_COMPILE", "1")
    spied = run(toys, tmp_path / "spied", *settings)
    assert set(tried[:2]) == {(5, False), (4, False)}
    assert (spied / "model.safetensors").read_bytes() == (eager / "model.safetensors").read_bytes()


def test_what_cannot_be_compiled_trains_as_it_is(toys, tmp_path, monkeypatch, capsys):
    def compile(network, **options):
        def call(clips):
            network(clips)
            raise RuntimeError("no compiler here\nat all")

        return call

    eager = run(toys, tmp_path / "eager", "training.epochs=1")
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setenv("FFN_COMPILE", "1")
    other = run(toys, tmp_path / "other", "training.epochs=1")
    assert capsys.readouterr().err == "training without torch.compile: no compiler here\n"
    assert (other / "model.safetensors").read_bytes() == (eager / "model.safetensors").read_bytes()


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in checkpoint.read_history(out)]


@on_gpu
def test_gpu_compiled_and_eager_losses_agree(toys, tmp_path, monkeypatch, capsys):
    compiled = run(toys, tmp_path / "compiled", device="cuda")
    assert "without torch.compile" not in capsys.readouterr().err
    monkeypatch.setenv("FFN_COMPILE", "0")
    eager = run(toys, tmp_path / "eager", device="cuda")
    np.testing.assert_allclose(losses(compiled), losses(eager), rtol=0.05)


@on_gpu
def test_gpu_bfloat16_learns_as_float32_does(toys, tmp_path):
    settings = ("training.epochs=30", "loss.name=cross_entropy")
    half, full = run(toys, tmp_path / "gpu", *settings, device="cuda"), run(toys, tmp_path / "cpu", *settings, device="cpu")
    np.testing.assert_allclose(losses(half)[:3], losses(full)[:3], rtol=0.1)
    assert measure(evaluate(toys, half)).top1 >= 0.75


@on_gpu
def test_gpu_resumed_training_ends_with_the_same_weights(toys, tmp_path):
    whole = run(toys, tmp_path / "whole", device="cuda")
    with pytest.raises(Interrupted):
        run(toys, tmp_path / "parts", device="cuda", on_epoch=stop_after(2))
    parts = run(toys, tmp_path / "parts", device="cuda")
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


@on_gpu
def test_gpu_no_step_waits_for_the_device(toys, tmp_path, monkeypatch):
    """From the first batch of an epoch to the sums at its end nothing is read back; the first epoch makes its constants."""
    from ffn.data.sampler import Sampler
    from ffn.parallel import Team

    clips, total, epochs = Sampler.train_clips, Team.sum, []

    def first(self, index, draws):
        torch.cuda.set_sync_debug_mode("error" if epochs else "default")
        return clips(self, index, draws)

    def last(self, tensor):
        torch.cuda.set_sync_debug_mode("default")
        return total(self, tensor)

    monkeypatch.setattr(Sampler, "train_clips", first)
    monkeypatch.setattr(Team, "sum", last)
    run(toys, tmp_path, "clip.rotate=0.2", device="cuda", on_epoch=epochs.append)
    assert len(epochs) == 4


@pytest.fixture(scope="module")
def trained(toys, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained")
    return {s: run(toys, folder / s, stream=s) for s in ("j", "b")}


def test_inference_from_raw_keypoints_is_evaluation(toys, trained, tmp_path):
    model = FusedModel.load(write_fused(tmp_path / "fused", trained, {"j": 1.0, "b": 1.0}))
    split = toys.split("p")
    scores = {stream: evaluate(toys, folder) for stream, folder in trained.items()}
    expected = (scores["j"].probabilities + scores["b"].probabilities) / 2
    raw = [np.concatenate([np.zeros((1, 2, 25, 3)), toys.sample(row)], 1) for row in split.test]
    np.testing.assert_allclose(model.predict(raw), expected, atol=1e-5)
    assert model.classes == split.classes


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (np.zeros((1, 4, 25, 3)), "recording 0: nobody visible"),
        (np.zeros((1, 4, 17, 3)), r"expected \(persons, frames, 25, 3\)"),
        (np.full((1, 4, 25, 3), np.nan), "recording 0: NaN, infinite or too large joint"),
        (np.full((1, 4, 25, 3), 7e4), "too large joint: person 0, frame 0"),
        (np.zeros((0, 4, 25, 3)), "expected"),
    ],
)
def test_inference_names_the_bad_recording(trained, tmp_path, clip, message):
    model = FusedModel.load(write_fused(tmp_path / "fused", trained, {"j": 1.0}))
    with pytest.raises(FFNError, match=message):
        model.predict([clip])


def test_checkpoints_are_fused_with_the_papers_weights(trained):
    assert FusedModel.of([trained["b"], trained["j"]]).weights == {"j": 1.0, "b": 1.0}
    assert FusedModel.of([trained["b"]]).weights == {"b": 1.0}
    with pytest.raises(FFNError, match="checkpoints of streams j: expected one stream, or j b, or j b jm bm, one checkpoint each"):
        FusedModel.of([trained["j"], trained["j"]])


def test_fused_model_refuses_strangers(trained, tmp_path):
    with pytest.raises(FFNError, match="no checkpoint of stream jm"):
        write_fused(tmp_path / "fused", trained, {"j": 1.0, "jm": 1.0})
    with pytest.raises(FFNError, match="checkpoint of stream b, expected j"):
        write_fused(tmp_path / "fused", {"j": trained["b"]}, {"j": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_broken_checkpoints_are_named(trained, tmp_path):
    with pytest.raises(FFNError, match="not a checkpoint"):
        checkpoint.load(tmp_path)
    meta, history = checkpoint.read_meta(trained["j"]), checkpoint.read_history(trained["j"])
    folder = checkpoint.write(tmp_path / "cut", meta, (trained["j"] / "model.safetensors").read_bytes()[:500], history)
    with pytest.raises(FFNError, match=r"model\.safetensors: weights do not fit"):
        checkpoint.load(folder)


def test_evaluation_refuses_other_data(trained, tmp_path):
    arrays, labels = toy_recordings(12)
    other = write_set(tmp_path / "other.arrow", arrays, "3d", labels=[label % 2 for label in labels])
    with pytest.raises(FFNError, match="trained on other classes"):
        evaluate(other, trained["j"])
