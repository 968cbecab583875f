"""Handles and what they name: kinds, quota, counts, and many threads at once."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from raytorch.autograd import Context, CustomFunction
from raytorch.errors import HandleError, QuotaError, RemoteOpError, SessionError
from raytorch.session.registry import FailedValue, HandleKind, Registry, kind_of

KIB = torch.zeros(256)
"""A tensor of 1,024 bytes."""


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)


def square() -> CustomFunction:
    return CustomFunction(lambda context, x: x * x, lambda context, grad: grad)


def scripted() -> torch.jit.ScriptModule:
    return torch.jit.ScriptModule()


def kib() -> torch.Tensor:
    return torch.zeros(256)


# -- handles -----------------------------------------------------------------------------------------------------------


def test_a_handle_is_an_integer_that_gives_the_very_object() -> None:
    registry, tensor = Registry(), torch.ones(3)
    handle = registry.new(tensor)
    assert type(handle) is int
    assert registry.get(handle) is tensor
    assert handle in registry
    assert len(registry) == 1
    assert list(registry) == [(handle, tensor)]


def test_the_same_object_may_have_several_handles() -> None:
    registry, tensor = Registry(), torch.ones(3)
    first, second = registry.new(tensor), registry.new(tensor)
    assert first != second
    registry.free([first])
    assert registry.get(second) is tensor


def test_a_handle_that_was_freed_is_stale_and_is_not_given_out_again() -> None:
    registry = Registry()
    handle = registry.new(torch.ones(3))
    registry.free([handle])
    assert handle not in registry
    assert len(registry) == 0
    with pytest.raises(HandleError, match=f"handle {handle} names nothing: it was freed, or was never given out"):
        registry.get(handle)
    assert handle not in {registry.new(0) for _ in range(100)}


def test_a_handle_that_was_never_given_out_names_nothing() -> None:
    with pytest.raises(HandleError, match="handle 12345 names nothing") as caught:
        Registry().get(12345)
    assert isinstance(caught.value, SessionError)


def test_freeing_passes_over_what_is_not_there() -> None:
    registry = Registry(max_bytes=1024)
    handle = registry.new(KIB)
    registry.free([handle, handle, 99])
    assert len(registry) == 0


def test_a_value_can_be_put_under_a_handle_of_ones_own_and_replaced() -> None:
    registry = Registry()
    registry.put(2, "one")
    registry.put(2, "other")
    assert registry.get(2) == "other"
    assert 2 not in {registry.new(index) for index in range(5)}
    assert registry.get(2) == "other"


def test_iteration_shows_the_registry_as_it_was_when_it_began() -> None:
    registry = Registry()
    handles = [registry.new(index) for index in range(10)]
    for handle, _ in registry:
        registry.free([handle])
        registry.new("another")
    assert not any(handle in registry for handle in handles)
    assert len(registry) == 10


# -- kinds -------------------------------------------------------------------------------------------------------------

VALUES: dict[HandleKind, Callable[[], Any]] = {
    HandleKind.TENSOR: lambda: torch.ones(2),
    HandleKind.TENSOR_LIST: lambda: [torch.ones(2), torch.ones(3)],
    HandleKind.CONTEXT: Context,
    HandleKind.FUNCTION: square,
    HandleKind.MODULE: lambda: nn.Linear(2, 2),
    HandleKind.OPTIMIZER: optimizer,
    HandleKind.SCHEDULER: lambda: StepLR(optimizer(), 1),
    HandleKind.SCRIPT: scripted,
    HandleKind.FAILED: lambda: FailedValue(RemoteOpError("it failed")),
    HandleKind.OBJECT: lambda: {"no": "tensor"},
}


@pytest.mark.parametrize("kind", VALUES, ids=str)
def test_the_kind_of_a_value_follows_from_its_type(kind: HandleKind) -> None:
    assert kind_of(VALUES[kind]()) == kind


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (nn.Parameter(torch.ones(2)), HandleKind.TENSOR),
        ((torch.ones(2), torch.ones(2)), HandleKind.TENSOR_LIST),
        (torch.max(torch.ones(2, 2), 1), HandleKind.TENSOR_LIST),
        ([], HandleKind.OBJECT),
        ([torch.ones(2), None], HandleKind.OBJECT),
        (nn.LSTM(2, 2), HandleKind.MODULE),
        (None, HandleKind.OBJECT),
    ],
)
def test_subclasses_and_mixtures_have_the_kind_one_expects(value: Any, kind: HandleKind) -> None:
    assert kind_of(value) == kind


@pytest.mark.parametrize("kind", VALUES, ids=str)
def test_asking_for_the_right_kind_gives_the_value_and_for_another_an_error_that_names_both(kind: HandleKind) -> None:
    registry, value = Registry(), VALUES[kind]()
    handle = registry.new(value)
    assert registry.get(handle, kind) is value
    for other in set(HandleKind) - {kind}:
        with pytest.raises(HandleError, match=f"handle {handle} names a {kind}, not a {other}"):
            registry.get(handle, other)


# -- the quota ---------------------------------------------------------------------------------------------------------


def test_what_exceeds_the_quota_is_refused_with_the_numbers_and_is_not_stored() -> None:
    registry = Registry(max_bytes=2048)
    registry.new(kib())
    with pytest.raises(QuotaError, match=r"1,028 bytes more .* 1,024 of 2,048 bytes .* max_bytes") as caught:
        registry.new(torch.zeros(257))
    assert isinstance(caught.value, SessionError)
    assert len(registry) == 1
    registry.new(kib())  # fits to the byte


def test_without_a_limit_nothing_is_refused() -> None:
    registry = Registry()
    for _ in range(100):
        registry.new(kib())
    assert len(registry) == 100


def test_views_share_their_storage_which_counts_once_and_until_the_last_is_freed() -> None:
    registry = Registry(max_bytes=1024)
    base = kib()
    handles = [registry.new(part) for part in (base, base[:10], base.view(16, 16).T, base.detach())]
    registry.free(handles[:-1])
    with pytest.raises(QuotaError):
        registry.new(torch.zeros(1))
    registry.free(handles[-1:])
    registry.new(kib())


def test_a_small_view_counts_all_of_the_storage_that_it_keeps_alive() -> None:
    registry = Registry(max_bytes=1023)
    with pytest.raises(QuotaError, match="1,024 bytes more"):
        registry.new(kib()[:1])


def test_freeing_gives_room() -> None:
    registry = Registry(max_bytes=1024)
    for _ in range(5):
        handle = registry.new(kib())
        with pytest.raises(QuotaError):
            registry.new(kib())
        registry.free([handle])


def test_a_replaced_value_gives_its_room_to_the_new_one() -> None:
    registry = Registry(max_bytes=1024)
    for _ in range(5):
        registry.put(1, kib())
    registry.put(1, "no tensor")
    registry.put(2, kib())


def test_a_value_that_was_to_be_replaced_by_one_too_large_stays_and_still_counts() -> None:
    registry, small = Registry(max_bytes=1024), torch.zeros(128)
    registry.put(1, small)
    with pytest.raises(QuotaError, match=r"2,048 bytes more"):
        registry.put(1, torch.zeros(512))
    assert registry.get(1) is small
    with pytest.raises(QuotaError):
        registry.put(2, kib())
    registry.put(2, torch.zeros(128))


def test_modules_and_lists_count_what_they_hold() -> None:
    linear = nn.Linear(16, 16, bias=False)  # 1,024 bytes
    registry = Registry(max_bytes=2048)
    module = registry.new(linear)
    weight = registry.new(linear.weight)
    parts = registry.new([torch.zeros(128), (torch.zeros(128),)])
    for handle in (module, weight):
        with pytest.raises(QuotaError):
            registry.new(kib())
        registry.free([handle])
    registry.new(kib())
    registry.free([parts])
    registry.new(kib())


def test_an_empty_tensor_takes_no_room() -> None:
    registry = Registry(max_bytes=0)
    handles = [registry.new(torch.zeros(0)) for _ in range(3)]
    registry.free(handles)
    with pytest.raises(QuotaError):
        registry.new(torch.zeros(1))


def test_what_has_grown_counts_when_it_is_counted_again_and_leaves_no_room() -> None:
    registry, weight = Registry(max_bytes=2048), kib().requires_grad_()
    first, view = registry.new(weight), registry.new(weight[:2])
    other = registry.new(kib())
    weight.grad = kib()
    with pytest.raises(
        QuotaError, match=r"1,024 bytes more, of gradients.* 3,072 of 2,048 bytes .*zero_grad.*max_bytes"
    ):
        registry.recount((), and_growing=True)
    registry.recount((), and_growing=True)  # it has not grown since
    registry.put(view, weight[2:])
    registry.put(other, kib())  # no more than it takes the place of
    with pytest.raises(QuotaError, match=r"4 bytes more .* 3,072 of 2,048"):
        registry.new(torch.zeros(1))
    weight.grad = None
    registry.recount([first], and_growing=False)
    registry.free([other])
    registry.new(kib())


def test_storages_of_one_address_and_two_sizes_do_not_upset_the_count() -> None:
    registry, large, weight = Registry(max_bytes=4096), torch.zeros(512), kib()
    first = registry.new(weight)
    weight.set_(large.untyped_storage()[:1024], 0, (256,))  # type: ignore[call-overload]
    second = registry.new(large)
    registry.recount([first, 99], and_growing=False)
    registry.free([first, second])
    registry.new(torch.zeros(1024))
    with pytest.raises(QuotaError):
        registry.new(torch.zeros(1))


# -- counts and bytes --------------------------------------------------------------------------------------------------


def test_stats_count_handles_per_kind_and_bytes_per_device() -> None:
    registry = Registry()
    base, linear = kib(), nn.Linear(3, 2)
    for value in (base, base[:4], torch.zeros(4, dtype=torch.uint8), linear, linear.weight, optimizer(), {"a": 1}):
        registry.new(value)
    registry.new(torch.empty(7, device="meta"))
    stats = registry.stats()
    assert stats["tensor"] == {"count": 5, "bytes": {"cpu": 1028, "meta": 28}}
    assert stats["module"] == {"count": 1, "bytes": {"cpu": 32}}
    assert stats["optimizer"] == {"count": 1, "bytes": {"cpu": 24}}  # of a module that has no handle
    assert stats["object"] == {"count": 1, "bytes": {}}
    assert set(stats) == {"tensor", "module", "optimizer", "object"}


def test_stats_of_an_empty_registry_are_empty() -> None:
    registry = Registry()
    registry.free([registry.new(kib())])
    assert registry.stats() == {}


def test_what_a_lazy_module_does_not_have_yet_is_not_counted() -> None:
    registry, module = Registry(max_bytes=4096), nn.LazyLinear(2)
    registry.new(module)
    registry.new(module.weight)
    assert registry.stats()["module"] == {"count": 1, "bytes": {}}
    module(torch.zeros(1, 3))
    assert registry.stats()["module"] == {"count": 1, "bytes": {"cpu": 32}}


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_bytes", [None, 16 * 8], ids=["without a quota", "with a quota"])
def test_sixteen_threads_allocate_use_and_free_ten_thousand_handles_each(max_bytes: int | None) -> None:
    threads, rounds = 16, 10_000
    registry, together = Registry(max_bytes), threading.Barrier(threads)

    def work(thread: int) -> list[int]:
        together.wait()
        handles = []
        for index in range(rounds):
            tensor = torch.empty(1, dtype=torch.int64)
            handle = registry.new(tensor)
            assert registry.get(handle, HandleKind.TENSOR) is tensor, (thread, index)
            registry.free([handle])
            handles.append(handle)
        return handles

    every = in_threads(work, range(threads))
    assert len({handle for handles in every for handle in handles}) == threads * rounds
    assert len(registry) == 0
    assert registry.stats() == {}
    if max_bytes:
        registry.new(torch.empty(max_bytes, dtype=torch.uint8))  # all room is there again


def test_the_registry_can_be_looked_through_while_others_change_it() -> None:
    registry, stop = Registry(), threading.Event()

    def change(_: int) -> None:
        while not stop.is_set():
            registry.free([registry.new(torch.empty(1)) for _ in range(10)])

    def look(_: int) -> None:
        try:
            for _ in range(300):
                assert set(registry.stats()) <= {"tensor"}
                assert all(isinstance(value, torch.Tensor) for _, value in registry)
        finally:
            stop.set()

    in_threads(lambda index: (look if index == 0 else change)(index), range(4))


def in_threads(work: Callable[[int], Any], arguments: Iterable[int]) -> list[Any]:
    """What ``work`` gives for each argument, each in a thread of its own; raises what a thread raised."""
    arguments = list(arguments)
    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(work, arguments))
