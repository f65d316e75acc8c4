"""The benchmark of training: its rows are ragged, and both ways train them alike."""

from collections import Counter

import pytest
import torch

from flashvl.bench.feed import Growth
from flashvl.bench.report import describe_growth, describe_training
from flashvl.bench.train import (
    TOKEN_BUDGET,
    Packing,
    TrainSpeed,
    _judge,
    _pad_batches,
    _Trainer,
    ragged_rows,
)
from flashvl.train.feed.documents import ConversationEncoder
from flashvl.train.feed.packing import pack
from flashvl.train.feed.shares import Share, decode_share, encode_share


def test_rows_are_of_all_kinds() -> None:
    rows = list(ragged_rows(300))
    pictures = Counter(len(row["images"]) for row in rows)
    assert set(pictures) == {0, 1, 2, 3, 4}
    assert 0.15 < pictures[0] / 300 < 0.35
    for row in rows:
        contents = [message["content"] for message in row["messages"]]
        assert sum(content.count("<image>") for content in contents) == len(row["images"])


@pytest.fixture(scope="module")
def trainer() -> _Trainer:
    return _Trainer("tiny")


@pytest.fixture(scope="module")
def share(trainer: _Trainer) -> Share:
    encoder = ConversationEncoder(processor=trainer.processor, max_length=TOKEN_BUDGET)
    documents = [encoder.encode(row["row"], 0, row) for row in ragged_rows(12)]
    lengths = [len(each.input_ids) for each in documents]
    (bins,) = pack(lengths, lengths, 1, TOKEN_BUDGET)
    packed = [[documents[place] for place in places] for places in bins]
    return decode_share(encode_share(0, 0, packed, [], 96))


def test_padded_batches_have_the_loss_of_packed_ones(trainer: _Trainer, share: Share) -> None:
    padded = _pad_batches(share)
    assert sum(len(each.lengths) for each in padded) == 12
    for batch in padded:
        assert len(batch.lengths) * batch.lengths.max() <= TOKEN_BUDGET
    num_items = torch.tensor(100.0)
    with torch.no_grad():
        losses = [
            sum(float(loss(batch, num_items)) for batch in batches)
            for loss, batches in (
                (trainer._padded_loss, padded),
                (trainer._packed_loss, share.micro_batches),
            )
        ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_fill_and_balance_are_shares(trainer: _Trainer, share: Share) -> None:
    found = _judge(trainer, [share], 1)
    tokens = sum(len(each.input_ids) for each in share.micro_batches)
    assert found.filled == tokens / (len(share.micro_batches) * TOKEN_BUDGET)
    assert found.balance == pytest.approx(1.0)


def test_reports() -> None:
    speed = TrainSpeed(
        padded=10.0,
        packed=16.0,
        fed=15.2,
        times_padded=1.6,
        of_ready=0.95,
        tokens_per_row=130.4,
        packing=[Packing(num_workers=8, filled=0.961, balance=0.98)],
    )
    lines = describe_training(speed, 3).splitlines()
    assert [float(line.split()[0]) for line in lines[1:4]] == [10.0, 16.0, 15.2]
    assert "1.60x" in lines[2] and "0.950 of ready" in lines[3]
    assert lines[4] == "8 workers: 96.1% of the token budget filled, work 98.0% balanced"
    growth = Growth(num_rows=10**4, order_mb=0.1, bitmap_mb=0.2, driver_mb=300.4, worker_mb=200.2)
    assert describe_growth([growth]).splitlines()[1].split() == [
        "10000",
        "0.10",
        "0.20",
        "300",
        "200",
    ]
