"""Placement groups, by which Ray reserves what workers need."""

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group


def list_reservations() -> set[str]:
    """Ids of the placement groups that this job holds."""
    job_id = ray.get_runtime_context().get_job_id()  # an id ends with that of its job
    return {
        group_id
        for group_id, group in placement_group_table().items()
        if group["state"] != "REMOVED" and group_id.endswith(job_id)
    }


def give_back(others: set[str]) -> None:
    """Remove the placement groups that this job holds, except `others`.

    Ray Train does it itself, but where its controller was lost it needs Ray's dashboard to. Without
    it, the next workers or their feed would wait for ever.
    """
    for group_id in list_reservations() - others:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))
