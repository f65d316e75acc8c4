"""The peers have the published models' sizes and numbers of image tokens for 1024x768."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForImageTextToText

from flashvl.bench.contenders import generate, make_photo
from flashvl.bench.models import RandomWeights
from flashvl.bench.peers import NUM_TEXT_TOKENS, PEERS, build_peers, paper_scores

PUBLISHED = {
    "Qwen2-VL-2B": 2.21,
    "InternVL2.5-2B": 2.21,
    "Aquila-VL-2B": 2.18,
    "SmolVLM2-2.2B": 2.25,
}
"""Parameters in 10^9, as the hub shows them."""
UNTIED_HEAD = {"Aquila-VL-2B": 151_936 * 1536}
"""Parameters that the hub counts twice: the file has the head and the embedding that equals it."""


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_has_its_published_size(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(PEERS[name].build_config())
    count = sum(weight.numel() for weight in model.parameters()) + UNTIED_HEAD.get(name, 0)
    assert round(count / 1e9, 2) == PUBLISHED[name]


@pytest.mark.long
def test_each_answers_about_the_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one narrow layer each: the models themselves refuse a wrong number of image tokens."""
    for name, peer in PEERS.items():
        config = peer.build_config()
        for part in (config.text_config, config.vision_config):
            part.num_hidden_layers = 1
            part.intermediate_size = 64
        shallow = dataclasses.replace(peer, build_config=lambda config=config: config)
        monkeypatch.setitem(PEERS, name, shallow)
    jpeg = make_photo(0)
    for contender in build_peers(RandomWeights(torch.float32)):
        peer = PEERS[contender.name]
        inputs = contender.prepare(jpeg)
        num_tokens = peer.num_image_tokens + peer.num_separators + NUM_TEXT_TOKENS
        assert inputs["input_ids"].shape == (1, num_tokens)
        assert len(generate(contender.model, inputs, 2)) == 2


def test_scores_are_the_papers() -> None:
    scores = paper_scores("iss")
    assert scores["flashvl"] == scores["vLLM"] == 64.8
    assert scores["Qwen2-VL-2B"] == 60.2
    assert "SmolVLM2-2.2B" not in scores
