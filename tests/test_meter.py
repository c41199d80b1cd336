"""The meter against numbers worked out by hand on small programs."""

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from implicitdiff.diagnostics import Measurement, Meter, measure
from implicitdiff.diagnostics.meter import format_bytes
from implicitdiff.diagnostics.traffic import storage_bytes

F32, F64 = 4, 8


def cost(fn, *args) -> Measurement:
    return measure(fn, *args)[1]


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float32)


# Bytes


def test_pointwise_reads_each_input_and_writes_the_result():
    x, y = torch.ones(3, 5, dtype=torch.float64), torch.ones(3, 5, dtype=torch.float64)
    found = cost(torch.mul, x, y)
    assert (found.bytes_read, found.bytes_written, found.flops) == (2 * 15 * F64, 15 * F64, 15)
    assert (found.operations, found.views, found.bytes) == (1, 0, 3 * 15 * F64)
    assert (found.peak, found.largest, found.largest_operation) == (15 * F64, 15, "mul.Tensor")


def test_the_same_view_is_read_once_and_two_parts_of_one_storage_twice():
    x = ones(6)
    assert cost(lambda: x * x).bytes_read == 6 * F32
    assert cost(lambda: x[:2] * x[3:5]).bytes_read == 4 * F32


def test_expanded_input_counts_at_its_storage_size():
    row, matrix = ones(5), ones(3, 5)
    found = cost(lambda: row.expand(3, 5) + matrix)
    assert (found.bytes_read, found.bytes_written) == ((5 + 15) * F32, 15 * F32)
    assert (found.operations, found.views, found.flops) == (1, 1, 15)
    assert storage_bytes(torch.ones(()).expand(7, 9)) == F32
    assert storage_bytes(torch.ones(10).unfold(0, 3, 1)) == 10 * F32
    assert storage_bytes(torch.ones(4, 0)) == 0


def test_strided_view_counts_the_entries_it_addresses():
    x = ones(4, 6)
    assert cost(lambda: x[:, ::2].exp()).bytes_read == 12 * F32


def test_views_and_metadata_cost_nothing_but_are_reported():
    x = ones(4, 6)
    found = cost(lambda: x.view(24)[None].transpose(0, 1).squeeze(1))
    assert (found.bytes, found.flops, found.operations, found.views, found.peak) == (0, 0, 0, 4, 0)
    detached = cost(lambda: x.detach())  # torch 2.6 detaches twice
    assert (detached.bytes, detached.operations, detached.peak, detached.views > 0) == (0, 0, 0, True)
    found = cost(lambda: ones(4, 6).t_().unsqueeze_(0))
    assert (found.bytes_written, found.operations, found.views) == (24 * F32, 1, 2)


def test_in_place_reads_and_writes_its_target_without_allocating():
    x, y = ones(7), ones(7)
    found = cost(lambda: x.add_(y))
    assert (found.bytes_read, found.bytes_written, found.flops) == (14 * F32, 7 * F32, 7)
    assert (found.peak, found.largest) == (0, 0)
    fused = cost(lambda: x.addcmul_(y, y))
    assert (fused.bytes_read, fused.bytes_written, fused.flops) == (14 * F32, 7 * F32, 14)


def test_overwriting_in_place_does_not_read_its_target():
    x, y = ones(7), ones(7)
    zeroed, copied = cost(lambda: x.zero_()), cost(lambda: x.copy_(y))
    assert (zeroed.bytes_read, zeroed.bytes_written) == (0, 7 * F32)
    assert (copied.bytes_read, copied.bytes_written, copied.flops) == (7 * F32, 7 * F32, 0)


def test_out_variant_writes_and_does_not_read_its_target():
    x, out = ones(7), torch.empty(7)
    found = cost(lambda: torch.mul(x, 2.0, out=out))
    assert (found.bytes_read, found.bytes_written, found.flops, found.peak) == (7 * F32, 7 * F32, 7, 0)


def test_an_out_variant_that_resizes_its_target_counts_the_new_size():
    x = ones(50)
    found = cost(lambda: torch.mul(x, 2.0, out=torch.empty(0)))
    assert (found.bytes_written, found.peak, found.retained) == (50 * F32, 50 * F32, 50 * F32)


def test_allocation_without_fill_moves_nothing_but_counts_in_the_peak():
    found = cost(lambda: torch.empty(100).fill_(1.0))
    assert (found.bytes_read, found.bytes_written, found.operations, found.views) == (0, 100 * F32, 1, 1)
    assert (found.peak, found.largest, found.largest_operation) == (100 * F32, 100, "empty.memory_format")


def test_gather_reads_what_it_returns():
    x, index = ones(1000, 4), torch.tensor([1, 7, 7])
    for program in (
        lambda: x[index],
        lambda: x.index_select(0, index),
        lambda: torch.nn.functional.embedding(index, x),
    ):
        found = cost(program)
        assert (found.bytes_read, found.bytes_written, found.flops) == (12 * F32 + 3 * 8, 12 * F32, 0)


def test_index_update_touches_the_addressed_entries_only():
    x, index, values = ones(1000, 4), torch.tensor([1, 7]), ones(2, 4)
    put = cost(lambda: x.index_put_((index,), values))
    assert (put.bytes_read, put.bytes_written) == (8 * F32 + 2 * 8, 8 * F32)
    added = cost(lambda: x.index_add_(0, index, values))
    assert (added.bytes_read, added.bytes_written) == (8 * F32 + 2 * 8 + 8 * F32, 8 * F32)
    scalar = cost(lambda: x.index_put_((index,), torch.tensor(3.0)))
    assert scalar.bytes_written == F32 + 8 * F32


def test_reading_a_number_back_is_an_operation():
    found = cost(lambda x: x.sum().item(), ones(10))
    assert (found.operations, found.bytes_read, found.flops) == (2, 10 * F32 + F32, 10)


# FLOPs


@pytest.mark.parametrize(
    ("program", "shapes", "flops", "read", "written"),
    [
        (torch.matmul, [(3, 5), (5, 7)], 2 * 3 * 5 * 7, 15 + 35, 21),
        (torch.matmul, [(2, 3, 5), (2, 5, 7)], 2 * 2 * 3 * 5 * 7, 30 + 70, 42),
        (torch.matmul, [(3, 5), (5,)], 2 * 3 * 5, 15 + 5, 3),
        (torch.dot, [(5,), (5,)], 2 * 5, 5 + 5, 1),
        (torch.addmm, [(7,), (3, 5), (5, 7)], 2 * 105 + 21, 7 + 15 + 35, 21),
        (lambda c, a, b: torch.addmm(c, a, b, beta=0), [(7,), (3, 5), (5, 7)], 2 * 105, 15 + 35, 21),
        (torch.baddbmm, [(2, 3, 7), (2, 3, 5), (2, 5, 7)], 2 * 210 + 42, 42 + 30 + 70, 42),
        (lambda a, b: torch.einsum("bij,bj->bi", a, b), [(2, 3, 5), (2, 5)], 2 * 30, 30 + 10, 6),
        (lambda x: x.sum(1), [(4, 6)], 24, 24, 4),
        (lambda x: x.square().sum(0), [(4, 6)], 48, 48, 24 + 6),
        (lambda x: x.exp().log(), [(4, 6)], 48, 48, 48),
        (lambda x: torch.linalg.vector_norm(x, dim=0), [(4, 6)], 48, 24, 6),
        (lambda x, y: torch.nn.functional.mse_loss(x, y, reduction="none"), [(4, 6), (4, 6)], 48, 48, 24),
        (lambda x, y: torch.cat([x, y]), [(4, 6), (1, 6)], 0, 30, 30),
        (lambda x: x.t().contiguous(), [(4, 6)], 0, 24, 24),
    ],
)
def test_products_reductions_and_pointwise(program, shapes, flops, read, written):
    found = cost(program, *(ones(*shape) for shape in shapes))
    assert (found.flops, found.bytes_read, found.bytes_written) == (flops, read * F32, written * F32)
    assert found.unknown == ()


@pytest.mark.parametrize(
    ("program", "flops"),
    [
        (lambda a, b: torch.linalg.cholesky_ex(a), 2 * round(6**3 / 3)),
        (lambda a, b: torch.linalg.lu_factor_ex(a), 2 * round(2 * 6**3 / 3)),
        (lambda a, b: torch.linalg.ldl_factor_ex(a), 2 * round(6**3 / 3)),
        (lambda a, b: torch.linalg.solve_triangular(a, b, upper=False), 2 * 36 * 4),
        (lambda a, b: torch.cholesky_solve(b, a), 2 * 2 * 36 * 4),
        (
            lambda a, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b),
            2 * round(2 * 6**3 / 3) + 2 * 2 * 36 * 4,
        ),
        (lambda a, b: torch.linalg.inv_ex(a), 2 * 2 * 6**3),
        (lambda a, b: torch.linalg.qr(a), 2 * (4 * 36 * (6 - 2))),
        (lambda a, b: torch.linalg.eigh(a), 2 * 9 * 6**3),
        (lambda a, b: torch.linalg.lstsq(a, b), 2 * ((2 * 36 * 4) + 4 * 3 * 36)),
    ],
)
def test_factorisations_by_their_standard_counts(program, flops):
    found = cost(program, 2 * torch.eye(6).expand(2, 6, 6).contiguous(), ones(2, 6, 4))
    assert found.flops == flops
    assert found.unknown == ()


def test_an_operation_without_a_rule_is_named():
    found = cost(torch.fft.fft, ones(8))
    assert found.unknown == ("_fft_r2c",)


@torch.library.custom_op("implicitdiff_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    """An operator that torch cannot look into."""
    return x + x


def test_a_custom_operator_is_one_operation_without_a_rule():
    found = cost(twice, ones(8))
    assert (found.operations, found.bytes_read, found.bytes_written) == (1, 8 * F32, 8 * F32)
    assert found.unknown == ("implicitdiff_tests.twice",)


def test_inference_mode_counts_the_parts_of_composite_operations():
    def program(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return x @ y

    found = cost(program, ones(3, 5), ones(5, 7))
    assert [total.name for total in found.by_operation] == ["mm"]
    assert found.flops == 2 * 105


# Memory


def test_peak_subtracts_freed_buffers_and_excludes_inputs():
    def program(x: torch.Tensor) -> torch.Tensor:
        a = x + 1  # 100
        b = a * 2  # 200
        del a  # 100
        c = b * 2  # 200
        del b
        return c.sum()  # 101

    found = cost(program, ones(100))
    assert (found.peak, found.retained) == (200 * F32, F32)
    assert (found.peak_operation, found.largest) == ("mul.Tensor", 100)


def test_a_view_keeps_its_storage_alive():
    def program(x: torch.Tensor) -> torch.Tensor:
        view = (x + 1)[:1]
        rest = x * 2
        return view + rest[:1]

    assert cost(program, ones(100)).peak == (200 + 1) * F32


def test_expanded_result_counts_once_and_its_copy_in_full():
    x = ones(1, 10)
    assert cost(lambda: (x + 1).expand(50, 10)).largest == 10
    copied = cost(lambda: (x + 1).expand(50, 10).contiguous())
    assert (copied.largest, copied.largest_operation) == (500, "clone")


def test_tensors_made_from_python_numbers_count():
    found = cost(lambda: torch.tensor([1.0, 2.0, 3.0]))
    assert (found.peak, found.bytes_read, found.bytes_written) == (3 * F32, 0, 3 * F32)


def test_sparse_tensors_count_their_members():
    sparse = torch.eye(4).to_sparse()
    found = cost(lambda: sparse * 2.0)
    assert found.bytes_read == 4 * F32 + 8 * 8


def test_integer_and_boolean_results_count_at_their_own_size():
    found = cost(lambda x: (x > 0).sum(), ones(10))
    assert found.bytes_written == 10 * 1 + 8


# Where it works


def test_backward_of_autograd_is_counted_with_its_saved_tensors_outside():
    x = ones(3, 4).requires_grad_()
    y = (x * x).exp().sum()
    gradient, found = measure(torch.autograd.grad, y, x)
    torch.testing.assert_close(gradient[0], 2 * torch.exp(torch.ones(3, 4)))
    # One for y, times exp(x^2), twice times x, and the sum of those two.
    assert {total.name: total.count for total in found.by_operation} == {
        "add.Tensor": 1,
        "mul.Tensor": 3,
        "ones_like": 1,
    }
    assert found.flops == 12 * 4
    # The expanded ones, grad * exp(x^2) and both products; the two products and their sum at the end.
    assert found.peak == (1 + 3 * 12) * F32


def test_what_autograd_saves_is_retained():
    x = ones(100).requires_grad_()
    assert cost(lambda: x.exp()).retained == 100 * F32
    # exp saves its result, the second exp its own, the sum nothing.
    assert cost(lambda: x.exp().exp().sum()).retained == (200 + 1) * F32
    assert cost(lambda: x.detach().exp().exp().sum()).retained == F32


def test_torch_func_transforms_are_counted_as_batched_operations():
    x = ones(5, 3)
    found = cost(torch.func.vmap(torch.func.grad(lambda row: (row * row).sum())), x)
    assert {total.name: total.count for total in found.by_operation}["mul.Tensor"] == 3
    assert found.flops == 15 * 5


@pytest.mark.parametrize("place", ["meta", "fake"])
def test_shapes_alone_give_the_same_numbers(place):
    def program(x: torch.Tensor) -> torch.Tensor:
        gram = x @ x.mT + torch.eye(x.shape[-2], device=x.device)
        return torch.linalg.cholesky_ex(gram).L.exp().sum((1, 2))

    real = cost(program, ones(2, 5, 7))
    if place == "meta":
        empty = cost(program, torch.empty(2, 5, 7, device="meta"))
    else:
        with FakeTensorMode():
            empty = cost(program, torch.empty(2, 5, 7))
    assert (empty.bytes_read, empty.bytes_written, empty.flops) == (
        real.bytes_read,
        real.bytes_written,
        real.flops,
    )
    assert (empty.operations, empty.views, empty.peak, empty.largest) == (
        real.operations,
        real.views,
        real.peak,
        real.largest,
    )


def test_meters_nest_and_do_not_disturb_each_other():
    x = ones(10)
    with Meter() as outer:
        x.exp()
        _, inner = measure(x.exp)
    assert inner.operations == 1
    assert outer.measurement().operations == 2


def test_numbers_do_not_depend_on_what_ran_before():
    def program(x: torch.Tensor) -> torch.Tensor:
        return (x @ x.mT).exp().sum()

    first = cost(program, ones(9, 4))
    gc.collect()
    assert cost(program, ones(9, 4)) == first


def test_an_error_in_the_call_passes_through_and_the_meter_ends():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        measure(torch.matmul, ones(2, 3), ones(2, 3))
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_text():
    text = str(cost(lambda x: (x + 1).view(100).sum(), ones(100)))
    assert text == (
        "2 operations and 1 views, 200 FLOPs, 1.2 KB moved (800 B read, 404 B written), "
        "peak 404 B at sum, largest tensor 100 entries by add.Tensor"
    )
    assert [format_bytes(n) for n in (0, 999, 1000, 8_200_000, 3 * 10**12)] == [
        "0 B",
        "999 B",
        "1.0 KB",
        "8.2 MB",
        "3000.0 GB",
    ]
