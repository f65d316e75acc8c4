"""What each alert fires for, and what it does not fire for, by Prometheus' own test of rules.

Ray's behaviour is part of the scenarios: counters of ended processes stay, gauges go.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.observability import RULES, rules

PROMTOOL = shutil.which("promtool")
SERVICE = '{application="flashvl"}'
ENGINES = '{application="flashvl",deployment="EngineReplica"}'
REFUSED = 'ray_flashvl_request_refused_total{application="flashvl",reason="rate_limit_exceeded"}'
ANSWERED = f"ray_flashvl_request_success_total{SERVICE}"
HEALTHY = 'ray_serve_deployment_replica_healthy{deployment="EngineReplica",application="flashvl",'
TTFT = 'ray_flashvl_time_to_first_token_seconds_bucket{application="flashvl",le='
ERRORS = 'ray_serve_num_http_error_requests_total{application="flashvl",error_code='
WORKER = '{WorkerId="1"}'
STAGE = '{stage="stage1"}'
UP = 'up{job="ray"}'

SCENARIOS: dict[str, tuple[dict[str, str], dict[int, set[str]]]] = {
    # A scenario is its series, one value a minute, and the alerts that fire after some minutes.
    "one request in ten is turned away": (
        {REFUSED: "0+10x30", ANSWERED: "0+90x30"},
        {5: set(), 15: {"FlashvlOverload"}},
    ),
    "all requests are turned away from the first one on": (
        {REFUSED: "0+10x30"},
        {5: set(), 15: {"FlashvlOverload"}},
    ),
    "one request in a hundred is turned away, and many are wrong": (
        {
            REFUSED: "0+1x40",
            REFUSED.replace("rate_limit_exceeded", "bad_request"): "0+50x40",
            ANSWERED: "0+99x40",
        },
        {40: set()},
    ),
    "two requests in a hundred wait longer than 5 s": (
        {f'{TTFT}"5.0"}}': "0+98x40", f'{TTFT}"10.0"}}': "0+100x40", f'{TTFT}"+Inf"}}': "0+100x40"},
        {9: set(), 15: {"FlashvlSlowFirstToken"}},
    ),
    "the last engine ends, and Ray forgets it": (
        {
            f'{HEALTHY}replica="1"}}': "1x5 0x3 stale",
            f'{HEALTHY}replica="2"}}': "1x9 0 stale",
            f"ray_serve_application_status{SERVICE}": "6x90",
        },
        {10: set(), 13: {"FlashvlNoReplica"}, 90: {"FlashvlNoReplica"}},
    ),
    "the first engines wait for GPUs": (
        {
            f"ray_serve_application_status{SERVICE}": "5x40",
            f"ray_serve_deployment_status{ENGINES}": "3x40",
        },
        {14: set(), 17: {"FlashvlReplicasMissing"}},
    ),
    "a service that removes engines is well": (
        {
            f'{HEALTHY}replica="1"}}': "1x40",
            f"ray_serve_application_status{SERVICE}": "6x40",
            f"ray_serve_deployment_status{ENGINES}": "5x40",
        },
        {40: set()},
    ),
    "the head is lost": (
        {
            f'{HEALTHY}replica="1"}}': "1x9 stale",
            f"ray_serve_application_status{SERVICE}": "6x9 stale",
            UP: "1x9 0x30",
        },
        {9: set(), 14: set(), 17: {"FlashvlServiceSilent", "RayNodeSilent"}},
    ),
    "two responses in a hundred are of status 503": (
        {
            f'{ERRORS}"503"}}': "0+2x30",
            f"ray_serve_num_http_requests_total{SERVICE}": "0+100x30",
        },
        {5: set(), 15: {"FlashvlServerErrors"}},
    ),
    "responses of status 429 are no errors of the server": (
        {
            f'{ERRORS}"429"}}': "0+50x30",
            f"ray_serve_num_http_requests_total{SERVICE}": "0+100x30",
        },
        {30: set()},
    ),
    "one row in fifty is a dead letter": (
        {
            'ray_flashvl_caption_dead_letters_total{step="decode"}': "0+1x30",
            'ray_flashvl_caption_dead_letters_total{step="read"}': "0+1x30",
            f"ray_flashvl_caption_rows_total{WORKER}": "0+100x30",
        },
        {5: set(), 15: {"FlashvlDeadLetters"}},
    ),
    "one of two jobs hangs": (
        {
            'ray_flashvl_caption_rows_left{output="a"}': "1000-10x9 910x30",
            'ray_flashvl_caption_rows_left{output="b"}': "1000-10x40",
            f"ray_flashvl_caption_rows_total{WORKER}": "0+20x40",
        },
        {25: set(), 32: {"FlashvlCaptioningStalled"}},
    ),
    "a job ends": (
        {
            'ray_flashvl_caption_rows_left{output="a"}': "100-10x10 0 stale",
            f"ray_flashvl_caption_rows_total{WORKER}": "0+10x10 100x90",
            f"ray_flashvl_caption_engine_idle_seconds_total{WORKER}": "0+6x10 60x90",
            f"ray_flashvl_caption_engine_occupancy_ratio{WORKER}": "0.9x10 stale",
        },
        {20: set(), 40: set(), 100: set()},
    ),
    "an engine waits half of the time, and others have ended": (
        {
            f"ray_flashvl_caption_engine_idle_seconds_total{WORKER}": "0+30x50",
            f"ray_flashvl_caption_engine_occupancy_ratio{WORKER}": "0.5x50",
            'ray_flashvl_caption_engine_idle_seconds_total{WorkerId="2"}': "60x50",
            'ray_flashvl_caption_engine_idle_seconds_total{WorkerId="3"}': "60x50",
        },
        {29: set(), 35: {"FlashvlEnginesIdle"}},
    ),
    "the workers of a stage are lost and do not come back": (
        {
            f"ray_flashvl_train_step{STAGE}": "0+5x9 stale",
            f"ray_flashvl_train_goodput_ratio{STAGE}": "0.9x40",
        },
        {20: set(), 35: {"FlashvlTrainingStalled"}},
    ),
    "a stage ends": (
        {
            f"ray_flashvl_train_step{STAGE}": "0+5x9 stale",
            f"ray_flashvl_train_goodput_ratio{STAGE}": "0.9x9 stale",
            f"ray_flashvl_train_checkpoint_timestamp_seconds{STAGE}": "0x9 stale",
        },
        {20: set(), 90: set()},
    ),
    "a stage makes slow steps and writes no checkpoint": (
        {
            f"ray_flashvl_train_step{STAGE}": "1 1 2 2 3 3 4 4 5+1x70",
            f"ray_flashvl_train_goodput_ratio{STAGE}": "0.9x80",
            f"ray_flashvl_train_checkpoint_timestamp_seconds{STAGE}": "0x80",
        },
        {62: set(), 70: {"FlashvlCheckpointOld"}},
    ),
    "a stage waits for data, and loses workers": (
        {
            f"ray_flashvl_train_step{STAGE}": "0+5x50",
            f"ray_flashvl_train_goodput_ratio{STAGE}": "0.7x50",
            f"ray_flashvl_train_data_wait_share{STAGE}": "0.3x50",
        },
        {
            14: set(),
            20: {"FlashvlTrainingWaitsForData"},
            35: {"FlashvlTrainingWaitsForData", "FlashvlLowGoodput"},
        },
    ),
    "Prometheus is told of no node": ({UP: "stale"}, {9: set(), 12: {"RayUnknown"}}),
    "the memory of a node is exhausted for the first time": (
        {'ray_memory_manager_worker_eviction_total{instance="a"}': "_x9 1x30"},
        {8: set(), 12: {"RayOutOfMemory"}, 39: set()},
    ),
    "a disk fills": (
        {'ray_node_disk_free{instance="a"}': "9x30", 'ray_node_disk_usage{instance="a"}': "91x30"},
        {4: set(), 10: {"RayDiskFull"}},
    ),
}


def test_every_alert_fires_in_some_scenario() -> None:
    fired = {name for _, after in SCENARIOS.values() for names in after.values() for name in names}
    assert fired == {rule["alert"] for rule in rules() if "alert" in rule}


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
def test_alerts_fire_when_they_should_and_at_no_other_time(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    tests = []
    for name, (series, after) in SCENARIOS.items():
        checks: list[dict[str, Any]] = [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{minutes}m",
                "exp_samples": [
                    {"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in sorted(alerts)
                ],
            }
            for minutes, alerts in after.items()
        ]
        values = {UP: "1x120"} | series
        tests.append(
            {
                "name": name,
                "interval": "1m",
                "input_series": [{"series": key, "values": each} for key, each in values.items()],
                "promql_expr_test": checks,
            }
        )
    file = tmp_path / "scenarios.yml"
    content = {"rule_files": [*map(str, RULES)], "evaluation_interval": "1m", "tests": tests}
    file.write_text(yaml.safe_dump(content))
    done = subprocess.run(
        [PROMTOOL, "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
