"""The training request: what is refused, and what of it is written down."""

from typing import Any

import pytest

from p4dprep.errors import RequestError
from student.train_config import FREE_FIELDS, TrainConfig, parse_config

NEEDED = {"cache": "cache", "student": "student", "out": "run"}


def test_the_defaults_are_the_papers() -> None:
    config = parse_config(NEEDED)
    assert (config.latent_weight, config.explicit_weight, config.decoder_width) == (0.5, 0.1, 2560)
    assert (config.epochs, config.batch_size, config.learning_rate, config.warmup_fraction) == (5, 1024, 1e-5, 0.03)
    assert (config.distill, config.time_cue, config.tune, config.strategy) == ("ld+ed", "tpe", "projector+llm", "p4d")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batchsize": 4}, r"batchsize: Extra inputs are not permitted \(fields: cache, qa, "),
        ({"cache": ""}, "cache: String should have at least 1 character"),
        ({"epochs": 0}, "epochs: Input should be greater than or equal to 1"),
        ({"learning_rate": 0}, "learning_rate: Input should be greater than 0"),
        ({"warmup_fraction": 1.5}, "warmup_fraction: Input should be less than or equal to 1"),
        ({"keep_checkpoints": 1}, "keep_checkpoints: Input should be greater than or equal to 2"),
        ({"time_cue": "clock"}, "time_cue: Input should be 'none', 'marks', 'prompt' or 'tpe'"),
        ({"save_steps": 15}, "save_steps 15 must be a multiple of log_steps 10"),
        ({"workers": 3}, "batch_size 1024 must be a multiple of workers x micro_batch_size, 3 x 1"),
        ({"distill": "sft"}, "without qa there is no text to learn"),
        ({"strategy": "4d-pe", "distill": "ld"}, "strategy 4d-pe reads the targets instead of learning them"),
        ({"strategy": "4d-pe"}, "without qa there is no text to learn"),
        ({"features": "student_features", "flip": True}, "cached features fit the cache's own frames only"),
        ({"features": "student_features", "time_cue": "marks"}, "cached features fit the cache's own frames only"),
    ],
)
def test_a_wrong_request_says_what_and_where_on_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        parse_config(NEEDED | changes)
    assert "\n" not in str(caught.value)


def test_a_wrong_value_is_not_repeated_for_it_may_be_a_secret() -> None:
    with pytest.raises(RequestError, match="storage_options: Input should be a valid dictionary") as caught:
        parse_config(NEEDED | {"storage_options": "c4n4ry"})
    assert "c4n4ry" not in str(caught.value)


def test_what_is_written_down_holds_no_secret_and_can_be_asked_for_again() -> None:
    asked = NEEDED | {"cache": "s3://key:c4n4ry@bucket/cache", "storage_options": {"secret": "c4n4ry"}}
    config = parse_config(asked)
    assert "c4n4ry" not in str(config.settings())
    assert "c4n4ry" not in repr(config.settings())
    assert "storage_options" not in config.settings()
    assert parse_config(config.settings()).settings() == config.settings()


def test_fields_that_may_change_are_fields() -> None:
    assert TrainConfig.model_fields.keys() > FREE_FIELDS
    assert not FREE_FIELDS & {"seed", "batch_size", "learning_rate", "distill", "tune", "precision", "trainer"}


@pytest.mark.parametrize(
    ("changes", "distils"),
    [({}, True), ({"distill": "sft", "qa": ("a",)}, False), ({"strategy": "4d-concat", "qa": ("a",)}, False)],
)
def test_distillation_is_off_for_text_alone_and_for_the_rivals(changes: dict[str, Any], distils: bool) -> None:
    assert parse_config(NEEDED | changes).distils is distils
