"""Measuring a tiny workload: every call that a plan makes here has its point."""

from pathlib import Path

import pytest
from conftest import cpu_cluster, make_workload

from executor.measure import profile
from planner.predict.cost import CostModel
from planner.predict.layouts import trainer_layouts
from planner.predict.profile import check_profiles, load_profiles
from planner.predict.roofline import Place


def test_a_profile_has_every_call_on_pools_of_one_and_of_two(ray_two: None, tmp_path: Path) -> None:
    workload = make_workload(response={"kind": "fixed", "tokens": 6})
    cluster, said = cpu_cluster(2), []
    result = profile(workload, cluster, tmp_path / "p.json", progress=said.append)
    assert load_profiles([tmp_path / "p.json"]) == (result,)
    check_profiles([result], workload, cluster)
    assert len(said) == 4

    points = {(point.call, point.role, point.gpus) for point in result.points}
    inferred, trained = ("reward", "reference", "actor", "critic"), ("actor", "critic")
    for gpus in (1, 2):
        assert {("infer", role, gpus) for role in inferred} | {("train", role, gpus) for role in trained} <= points
    assert {(p.engines, p.shared) for p in result.points if p.call == "transfer"} == {(1, True), (2, True), (2, False)}
    assert {p.engines for p in result.points if p.call == "generate"} == {1, 2}
    assert ("host", "advantages", 1) in points
    assert all(0 < p.seconds < 5 and p.repeats >= 3 for p in result.points)

    model, device = CostModel(workload, cluster, [result]), cluster.device_of((0, 0))
    for role in trained:  # the planner takes them as they were measured
        layout = next(trainer_layouts(workload, role, 1, "p", device))
        estimate = model.train(role, layout, Place(parts=(1,), device=device))
        (measured,) = [p.seconds for p in result.points if (p.call, p.role, p.gpus) == ("train", role, 1)]
        assert estimate.source == "measured"
        assert float(estimate.seconds[0]) == pytest.approx(measured, rel=1e-6)
