from __future__ import annotations

from dinocli.method import shipped
from dinocli.method.preset import load_preset
from dinocli.method.settings import changes, flat, shipped_as


def test_a_schedule_is_one_value_and_the_rest_goes_by_its_key() -> None:
    found = dict(flat(load_preset("tiny").model_dump(mode="json")))
    assert found["backbone.options.depth"] == "4"
    assert found["teacher.momentum"] == "cosine, start 0.98, end 1.0, warmup_epochs 0"
    assert found["optimizer.clip"] is not None
    assert found["backbone.name"] == "vit_tiny_patch16_224"


def test_a_run_is_known_by_its_recipe_whatever_was_changed_and_measured_since() -> None:
    for name in shipped.names():
        stored = load_preset(name).model_dump(mode="json")
        stored["training"]["epochs"] = 7777
        stored["about"] |= {"expected": "other figures", "cost": "another machine"}
        found, before = shipped_as(stored)
        assert found == name
        assert list(changes(stored, before)) == ["training.epochs"]
        assert changes(stored, before)["training.epochs"][0] == "7777"


def test_a_preset_of_ones_own_is_no_shipped_one() -> None:
    stored = load_preset("tiny").model_dump(mode="json")
    stored["about"]["source"] = "mine"
    assert shipped_as(stored) == ("", {})
    assert shipped_as({"about": None}) == shipped_as({}) == ("", {})


def test_what_one_has_and_the_other_lacks_is_a_change() -> None:
    assert changes({"a": {"b": 1, "c": None}}, {"a": {"d": [2]}}) == {"a.b": ("1", None), "a.d": (None, "[2]")}
