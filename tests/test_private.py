"""The private names of ray and torch that are used: whether the versions that are installed have
them. Those of vLLM are looked at in test_vllm_engine.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from processes import running
from ray._private import auto_init_hook, ray_constants, worker
from torch import nn
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from executor.fleet import gpu_memory, ray_private, torch_private


def test_rays_session_has_a_directory_of_logs(ray_two: None) -> None:
    directory = ray_private.logs_directory()
    assert directory is not None and directory.is_dir()
    assert (directory / "raylet.out").exists()
    node: Any = worker._global_node
    pids = [each.process.pid for started in node.all_processes.values() for each in started]
    assert len(pids) >= 2 and all(running(pid) for pid in pids)


def test_ray_has_what_a_private_session_needs() -> None:
    assert hasattr(worker, "_global_node") and hasattr(auto_init_hook, "enable_auto_connect")
    known = ray_constants.ENABLE_RAY_CLUSTER
    with ray_private.without_other_hosts():
        assert ray_constants.ENABLE_RAY_CLUSTER is False
    assert ray_constants.ENABLE_RAY_CLUSTER is known
    options = ray_private.start_options("127.0.0.1", Path("there"), 32)
    assert options["_temp_dir"] == "there"  # that Ray knows it: every session starts with these


def test_ray_looks_for_modules_where_it_is_told_and_nowhere_else() -> None:
    """It would extend the list by the working directory."""
    config = ray_private.job_config(["there"])
    config._py_driver_sys_path.extend(["/home/me"])
    assert list(config._get_proto_job_config().py_driver_sys_path) == ["there"]


def test_torch_takes_settings_of_its_allocator() -> None:
    with pytest.raises(ValueError, match="Expected 'True' or 'False'"):
        torch_private.set_allocator("expandable_segments:maybe")
    grow = f"expandable_segments:True,large_segment_size_mb:{gpu_memory.SEGMENT_MB}"
    for settings in (grow, "expandable_segments:False"):
        torch_private.set_allocator(settings)
        assert torch._C._accelerator_getAllocatorSettings() == settings


def test_storages_are_told_apart_while_they_are_empty() -> None:
    one, other = torch.zeros(3), torch.zeros(3)
    storage, part = one.untyped_storage(), one[1:]
    storage.resize_(0)
    assert torch_private.is_same_storage(storage, part.untyped_storage())
    assert not torch_private.is_same_storage(storage, other.untyped_storage())


def test_fusions_do_not_depend_on_the_number_of_tokens() -> None:
    settings: Any = torch._inductor.config.triton
    before = settings.mix_order_reduction  # of torch 2.10 and later
    try:
        torch_private.fuse_alike_for_any_size()
        assert settings.mix_order_reduction is False
    finally:
        settings.mix_order_reduction = before


def test_code_may_be_compiled_for_all_roles() -> None:
    before = torch._dynamo.config.recompile_limit
    try:
        torch_private.allow_recompiling(64)
        assert torch._dynamo.config.recompile_limit == 64
    finally:
        torch._dynamo.config.recompile_limit = before


def test_buffers_that_no_file_holds() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("computed", torch.zeros(1), persistent=False)
    assert torch_private.is_stored(module, "kept")
    assert not torch_private.is_stored(module, "computed")


def test_a_handle_names_the_device_where_it_is_expected() -> None:
    names = rebuild_cuda_tensor.__code__.co_varnames
    assert names[torch_private.DEVICE] == "storage_device"
