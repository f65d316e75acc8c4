"""What the benchmarks print: the figures that were measured, and what follows from them."""

from flashvl.bench.caption import CaptionSpeed
from flashvl.bench.images import ImageSpeed
from flashvl.bench.report import (
    describe_captioning,
    describe_images,
    describe_service,
    describe_together,
)
from flashvl.bench.serve import Overload, ServiceSpeeds, Speed
from flashvl.bench.together import Company


def test_images() -> None:
    ours = ImageSpeed(name="ours", images_per_s=60.0, relative=3.0)
    theirs = ImageSpeed(name="theirs", images_per_s=20.0, relative=1.0)
    head, first, second = describe_images([ours, theirs], (640, 480), 7).splitlines()
    assert head == "JPEGs of 640x480 a second, one core, median of 7 rounds"
    assert first.split() == ["ours", "60.0", "3.00x"]
    assert second.split() == ["theirs", "20.0", "1.00x"]
    assert len(first) == len(second)


def test_captioning() -> None:
    speed = CaptionSpeed(
        engine=20.0,
        decoding=30.0,
        limit=15.0,
        job=12.0,
        naive=4.0,
        of_limit=0.8,
        times_naive=3.0,
        cores=2,
    )
    lines = describe_captioning(speed, 5).splitlines()
    assert lines[0] == "images/s, median of 5 rounds, 2 cores"
    assert [float(line.split()[0]) for line in lines[1:]] == [20.0, 30.0, 15.0, 12.0, 4.0]
    assert "1 / (1 / 20.0 + 1 / (2 x 30.0))" in lines[3]
    assert "0.80 of that" in lines[4] and "3.00 times as fast" in lines[5]


def test_the_service_beside_its_engine_and_under_overload() -> None:
    def speed(name: str, width: int, ttft_ms: float, tokens_per_s: float) -> Speed:
        return Speed(
            name=name,
            width=width,
            ttft_ms=ttft_ms,
            tokens_per_s=tokens_per_s,
            largest_gap_ms=1.0,
        )

    speeds = [
        speed("engine", 1, 100.0, 50.0),
        speed("service", 1, 110.0, 45.0),
        speed("engine", 16, 300.0, 200.0),
        speed("service", 16, 290.0, 150.0),
    ]
    overload = Overload(
        capacity_per_s=10.0,
        offered_per_s=40.0,
        answered_per_s=9.0,
        refused=300,
        failed=0,
        ttft_p50_ms=900.0,
        ttft_p99_ms=1500.0,
        ttft_bound_ms=2400.0,
        memory_start_mb=500.0,
        memory_end_mb=510.0,
    )
    text = describe_service(ServiceSpeeds(speeds=speeds, overload=None))
    table, one, sixteen = text.splitlines()[:5], *text.splitlines()[5:]
    assert table[0].split() == "clients TTFT ms tokens/s largest gap ms".split()
    assert [row.split()[:2] for row in table[1:]] == [
        ["engine", "1"],
        ["service", "1"],
        ["engine", "16"],
        ["service", "16"],
    ]
    assert one == "1 clients: TTFT +10.0 ms, 0.90 of the engine's tokens/s"
    assert sixteen == "16 clients: TTFT -10.0 ms, 0.75 of the engine's tokens/s"
    text = describe_service(ServiceSpeeds(speeds=speeds, overload=overload))
    assert "9.0 answered/s (0.90 of capacity), 300 refused, 0 failed" in text
    assert text.endswith("bound 2400 ms; memory 500 -> 510 MB")


def test_requests_beside_a_job() -> None:
    found = Company(
        requests=320,
        rate=4.0,
        failed=1,
        ttft_p50_alone_ms=40.0,
        ttft_p99_alone_ms=80.0,
        ttft_p50_together_ms=50.0,
        ttft_p99_together_ms=100.0,
        p99_ratio=1.25,
        rows_per_s_alone=60.0,
        rows_per_s_together=45.0,
    )
    head, *table = describe_together(found, 4).splitlines()
    assert head == "320 requests alone and 320 beside the job, 4 a second, 4 rounds; 1 failed"
    assert [row.split()[-3:] for row in table[1:]] == [
        ["40.0", "50.0", "1.25x"],
        ["80.0", "100.0", "1.25x"],
        ["60.0", "45.0", "0.75x"],
    ]
