"""What a Prometheus server reads from the service, and what the logs leave out."""

import time
from pathlib import Path

import requests
from prometheus_client.parser import text_string_to_metric_families
from ray.cluster_utils import Cluster

from tests.support.images import encode, noise
from tests.support.serving import ask

SECRET = "my secret question"


def read(cluster: Cluster) -> dict[str, float]:
    """Sums over replicas, by the samples' names and labels."""
    port = cluster.head_node.metrics_export_port
    text = requests.get(f"http://{cluster.head_node.node_ip_address}:{port}/metrics", timeout=30)
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text.text):
        for sample in family.samples:
            if sample.name.startswith("ray_flashvl") and "le" not in sample.labels:
                kinds = [sample.labels.get(key) for key in ("finished_reason", "reason")]
                name = " ".join([sample.name, *filter(None, kinds)])
                found[name] = found.get(name, 0.0) + sample.value
    return found


def read_settled(cluster: Cluster) -> dict[str, float]:
    """The metrics once those of the tests before have arrived: Ray's agent gets them every 10 s."""
    name, last = "ray_flashvl_generation_tokens_total", -1.0
    while (now := read(cluster)).get(name, 0.0) != last:
        last = now.get(name, 0.0)
        time.sleep(3)
    return now


def test_metrics_count_what_was_answered(url: str, cluster: Cluster) -> None:
    picture = encode(noise(77))
    body = {"model": "tiny", "messages": ask(SECRET, picture), "max_tokens": 5, "ignore_eos": True}
    before = read_settled(cluster)
    for _ in range(3):
        answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200
    prompt_tokens = answer.json()["usage"]["prompt_tokens"]
    bad = {"model": "tiny", "messages": ask("Hi", picture[:-1000])}
    assert requests.post(f"{url}/v1/chat/completions", json=bad, timeout=60).status_code == 400
    expected = {
        "ray_flashvl_time_to_first_token_seconds_count": 3,
        "ray_flashvl_time_per_output_token_seconds_count": 3,
        "ray_flashvl_request_queue_time_seconds_count": 3,
        "ray_flashvl_prompt_tokens_total": 3 * prompt_tokens,
        "ray_flashvl_generation_tokens_total": 15,
        "ray_flashvl_request_success_total length": 3,
        "ray_flashvl_request_refused_total invalid_image": 1,
    }
    # Health checks show the engine pictures too.
    least = {"ray_flashvl_image_cache_hits_total": 2, "ray_flashvl_image_cache_misses_total": 1}
    deadline_s = time.monotonic() + 40
    while True:  # they take a second or two to arrive
        now = read(cluster)
        new = {name: now.get(name, 0.0) - before.get(name, 0.0) for name in expected | least}
        wrong = {name: new[name] for name, value in expected.items() if new[name] != value}
        wrong |= {name: new[name] for name, value in least.items() if new[name] < value}
        if not wrong:
            break
        assert time.monotonic() < deadline_s, wrong
        time.sleep(1)
    for gauge in ("num_requests_running", "num_requests_waiting", "batch_occupancy_ratio"):
        assert f"ray_flashvl_{gauge}" in now


def test_several_answers_to_a_prompt_share_it(url: str, cluster: Cluster) -> None:
    """Its picture is encoded once, and its tokens are read once; the answers differ."""
    before = read_settled(cluster)
    body = {
        "model": "tiny",
        "messages": ask("a large red circle " * 100, encode(noise(79))),
        "max_tokens": 8,
        "n": 8,
        "temperature": 2.0,
        "seed": 3,
    }
    answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert len({choice["message"]["content"] for choice in answer["choices"]}) > 1
    prompt_tokens = answer["usage"]["prompt_tokens"]
    after = read_settled(cluster)
    names = ("ray_flashvl_prefilled_tokens_total", "ray_flashvl_image_cache_misses_total")
    read_tokens, encoded = (after[name] - before.get(name, 0.0) for name in names)
    # Health checks have short prompts, about a picture that is kept.
    assert 8 * 50 < prompt_tokens <= read_tokens < 2 * prompt_tokens
    assert encoded == 1


def test_logs_tell_of_requests_and_not_what_was_said(url: str, cluster: Cluster) -> None:
    body = {"model": "tiny", "messages": ask(SECRET, encode(noise(78))), "max_tokens": 5}
    headers = {"X-Request-ID": "a-request-of-this-test"}
    requests.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    folder = Path(cluster.head_node.get_session_dir_path()) / "logs"
    deadline_s = time.monotonic() + 30
    while True:
        texts = [file.read_text(errors="replace") for file in (folder / "serve").glob("*.log")]
        told = [
            line
            for text in texts
            for line in text.splitlines()
            if "a-request-of-this-test" in line and "completion_tokens=5" in line
        ]
        if told:
            break
        assert time.monotonic() < deadline_s
        time.sleep(1)
    everything = [file.read_text(errors="replace") for file in folder.rglob("*") if file.is_file()]
    assert not any(SECRET in text or "data:image" in text for text in everything)
