"""What Ray's controller of a training leaves where it is killed."""

from __future__ import annotations

import ray
from ray._private import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group


def release(controller: str) -> None:
    """Give back what the workers of a dead controller, by its actor's id, had reserved.

    A placement group outlives the actor that made it for as long as the driver lives, and what Ray has against this
    asks the dashboard, which not every cluster shows: the next group would wait for ever. Ray's public tables do not
    say who made a group, so this reads the table that they are made of.
    """
    for held in state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(held)
        if group.creator_actor_id.hex() == controller and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
