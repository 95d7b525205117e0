"""FLOPs of a token, against figures computed by hand."""

import pytest

from puna.model.config import preset
from puna.model.flops import attended_length, flops_per_token


@pytest.mark.parametrize(
    ("name", "length", "full", "causal"),
    [("codellama-7b", 4096, 46.1e9, 42.9e9), ("codellama-34b", 4096, 220.2e9, 210.5e9),
     ("codellama-34b", 16384, 278.2e9, 239.5e9), ("codellama-70b", 4096, 444.5e9, 428.4e9)],
)  # fmt: skip
def test_code_llamas_cost(name: str, length: int, full: float, causal: float) -> None:
    config = preset(name)
    assert flops_per_token(config, length) == pytest.approx(full, rel=2e-3)
    assert flops_per_token(config, length, convention="causal") == pytest.approx(causal, rel=2e-3)


def test_packed_documents_attend_only_within_themselves() -> None:
    assert attended_length([100]) == 100
    assert attended_length([50, 50]) == 50
    assert attended_length([90, 10]) == pytest.approx(82)
