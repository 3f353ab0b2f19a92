import json
import subprocess
import sys

import pytest

from ffn import config
from ffn.config import PRESETS, digest, from_dict, override, preset, to_dict
from ffn.errors import FFNError


def test_override_reads_every_kind():
    changed = override(
        preset("S4"), ["training.lr=0.1", "training.epochs = 3", "model.depths=2,2", "loss.name=focal", "clip.rotate=0"]
    )
    assert (changed.training.lr, changed.training.epochs, changed.model.depths) == (0.1, 3, (2, 2))
    assert (changed.loss.name, changed.clip.rotate) == ("focal", 0.0)
    assert changed.model.attention == "aff", "what is not named stays"


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("training.ll=1", "training.lr"),
        ("trainin.lr=1", "training.lr"),
        ("lr=1", "training.lr"),
        ("preset=S0", "expected one of"),
        ("training.epochs=ten", "a whole number"),
        ("training.epochs=1.5", "a whole number"),
        ("training.lr=fast", "a number"),
        ("model.spatial=gnc", "gcn"),
        ("model.depths=a,b", "whole numbers"),
        ("training.lr", "section.field=value"),
    ],
)
def test_override_names_the_mistake(setting, hint):
    with pytest.raises(FFNError, match=hint) as caught:
        override(preset("S0"), [setting])
    assert "\n" not in str(caught.value)


def test_unknown_preset_names_near_misses():
    with pytest.raises(FFNError, match="S3-aff1"):
        preset("S3-aff")


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_json(name):
    assert PRESETS[name].preset == name
    assert from_dict(json.loads(json.dumps(to_dict(PRESETS[name])))) == PRESETS[name]


def test_an_unknown_setting_in_a_checkpoint_is_an_error():
    plain = to_dict(preset("S0"))
    plain["model"]["heads"] = 8
    with pytest.raises(FFNError, match="heads"):
        from_dict(plain)


def test_a_checkpoint_from_before_the_rivals_is_ffn():
    plain = to_dict(preset("S4"))
    del plain["model"]["network"]
    assert from_dict(plain) == preset("S4")


def test_digest_names_content():
    assert digest(1, {"a": 2, "b": 3}) == digest(1, {"b": 3, "a": 2}) != digest(1, {"a": 2, "b": 4})


def test_config_imports_only_the_standard_library():
    code = f"import sys; import {config.__name__}; print([m for m in ('torch', 'numpy', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
