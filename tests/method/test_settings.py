from __future__ import annotations

from dinocli.method import shipped
from dinocli.method.preset import load_preset
from dinocli.method.settings import changes, flat, shipped_as


def test_flat_lists_each_key_and_a_schedule_as_one_value() -> None:
    found = dict(flat(load_preset("tiny-dino").model_dump(mode="json")))
    assert found["backbone.options.depth"] == "4"
    assert found["teacher.momentum"] == "cosine, start 0.98, end 1.0, warmup_epochs 0"
    assert found["optimizer.clip"] is not None
    assert found["backbone.name"] == "vit_tiny_patch16_224"


def test_shipped_as_recognises_presets_with_changed_settings_and_results() -> None:
    for name in shipped.names():
        stored = load_preset(name).model_dump(mode="json")
        stored["training"]["epochs"] = 7777
        stored["about"] |= {"expected": "other figures", "cost": "another machine"}
        found, before = shipped_as(stored)
        assert found == name
        assert list(changes(stored, before)) == ["training.epochs"]
        assert changes(stored, before)["training.epochs"][0] == "7777"


def test_shipped_as_returns_nothing_for_a_users_own_preset() -> None:
    stored = load_preset("tiny-dino").model_dump(mode="json")
    stored["about"]["source"] = "mine"
    assert shipped_as(stored) == ("", {})
    assert shipped_as({"about": None}) == shipped_as({}) == ("", {})


def test_settings_of_only_one_preset_are_changes() -> None:
    assert changes({"a": {"b": 1, "c": None}}, {"a": {"d": [2]}}) == {"a.b": ("1", None), "a.d": (None, "[2]")}
