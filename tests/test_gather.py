"""The gather of kept tokens and the union of views against plain torch."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast_kernels import gather
from mmfast_kernels.gather import gather_into, gather_tubes, gather_tubes_ref, union_rows, union_rows_ref
from mmfast_kernels.sampling import sample_keep

# channels, tubelet, patch: RGB, flow and pose of the published models, CLIP's patches, and odd ones.
SHAPES = [(3, 2, 16), (3, 3, 16), (2, 2, 16), (21, 2, 4), (3, 1, 14), (1, 1, 1), (3, 3, 5), (4, 1, 8)]


def make_video(channels: int, tubelet: int, patch: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """[2, C, 2 tubelets, 3 patches, 2 patches]: a grid of 12 tokens a clip."""
    size = (2, channels, 2 * tubelet, 3 * patch, 2 * patch)
    pixels = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return pixels if dtype == torch.uint8 else pixels.to(dtype) / 7


def layouts(video: Tensor) -> dict[str, Tensor]:
    """The same pixels on different strides."""
    wide = torch.zeros(*video.shape[:-1], 2 * video.shape[-1], dtype=video.dtype)
    wide[..., ::2] = video
    padded = torch.zeros(*video.shape[:-2], video.shape[-2] + 1, video.shape[-1] + 3, dtype=video.dtype)
    padded[..., 1:, 2:-1] = video
    return {
        "planes": video.contiguous(),
        "channels last": video.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3),
        "frames of planes": video.transpose(1, 2).contiguous().transpose(1, 2),
        "turned": video.transpose(3, 4).contiguous().transpose(3, 4),
        "every second pixel": wide[..., ::2],
        "cut out": padded[..., 1:, 2:-1],
        "one clip for both": video[:1].expand(2, -1, -1, -1, -1),
        "one channel for all": video[:, :1].expand(-1, video.shape[1], -1, -1, -1),
    }


def some_tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randint(0, 12, (23,), generator=generator, dtype=torch.int32),
        torch.randint(0, 2, (23,), generator=generator, dtype=torch.int32),
    )


def affine(channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(channels, generator=generator) / 60, -torch.rand(channels, generator=generator)


LAYOUTS = list(layouts(make_video(1, 1, 1)))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "tubelet", "patch"), SHAPES, ids=str)
def test_raw_bytes_equal_reference(channels: int, tubelet: int, patch: int, layout: str) -> None:
    video = layouts(make_video(channels, tubelet, patch))[layout]
    token, clip = some_tokens()
    got = gather_tubes(video, token, clip, tubelet, patch)
    assert got.dtype == torch.uint8
    assert torch.equal(got, gather_tubes_ref(video, token, clip, tubelet, patch))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "tubelet", "patch"), SHAPES, ids=str)
def test_scaled_rows_equal_reference(channels: int, tubelet: int, patch: int, layout: str, dtype: torch.dtype) -> None:
    """Bit for bit: value = pixel*scale + shift, rounded after each of the two."""
    video = layouts(make_video(channels, tubelet, patch, dtype))[layout]
    token, clip = some_tokens()
    scale, shift = affine(channels)
    got = gather_tubes(video, token, clip, tubelet, patch, scale, shift)
    assert got.dtype == torch.float32
    assert torch.equal(got, gather_tubes_ref(video, token, clip, tubelet, patch, scale, shift))


def test_rows_are_in_the_order_of_a_convolutions_weight() -> None:
    video = make_video(3, 2, 4, torch.float32)
    weight = torch.randn(5, 3, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    token, clip = some_tokens()
    dense = torch.nn.functional.conv3d(video, weight, stride=(2, 4, 4)).flatten(2)  # [B, D, tokens]
    rows = gather_tubes(video, token, clip, 2, 4) @ weight.flatten(1).T
    torch.testing.assert_close(rows, dense[clip.long(), :, token.long()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pixels_without_scale_in_another_dtype(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    video, (token, clip) = make_video(3, 2, 16, dtype), some_tokens()
    got = gather_tubes(video, token, clip, 2, 16, out_dtype=out_dtype)
    assert torch.equal(got, gather_tubes_ref(video, token, clip, 2, 16).to(out_dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_no_tokens(dtype: torch.dtype) -> None:
    none = torch.empty(0, dtype=torch.int32)
    assert gather_tubes(make_video(3, 2, 4, dtype), none, none, 2, 4).shape == (0, 96)
    assert gather_tubes(make_video(3, 2, 4, dtype)[:0], none, none, 2, 4).shape == (0, 96)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_number_of_threads_does_not_matter(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    video = make_video(3, 2, 16)
    token, clip = (ids.repeat(40) for ids in some_tokens())
    expected = gather_tubes_ref(video, token, clip, 2, 16, *affine(3))
    monkeypatch.setattr(gather, "threads", lambda: threads)
    assert torch.equal(gather_tubes(video, token, clip, 2, 16, *affine(3)), expected)


def test_concurrent_callers() -> None:
    video, (token, clip) = make_video(3, 2, 16), some_tokens()
    expected = gather_tubes_ref(video, token, clip, 2, 16)
    equal: list[bool] = []

    def call() -> None:
        equal.extend(torch.equal(gather_tubes(video, token, clip, 2, 16), expected) for _ in range(20))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert equal == [True] * 80


@pytest.mark.parametrize("scaled", [False, True], ids=["raw", "scaled"])
@pytest.mark.parametrize("layout", ["planes", "channels last"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_more_rows_than_a_cache_holds(offset: int, dtype: torch.dtype, layout: str, scaled: bool) -> None:
    """They are written past the caches, unless they lie off the multiples of 16 bytes that this takes."""
    if scaled and dtype == torch.uint8:
        pytest.skip("scaled rows are floats")
    video = layouts(make_video(3, 2, 16))[layout]
    token, clip = (ids.repeat(50) for ids in some_tokens())
    given = affine(3) if scaled else (None, None)
    buffer = torch.full((len(token) * 1536 + 2,), 7, dtype=dtype)
    rows = buffer[offset : offset + len(token) * 1536].view(-1, 1536)
    gather_into(rows, video, token, clip, 2, 16, *given)
    expected = gather_tubes_ref(video, token[:23], clip[:23], 2, 16, *given, dtype)
    assert torch.equal(rows.view(50, 23, 1536), expected.expand(50, -1, -1))
    assert buffer[:offset].tolist() == [7] * offset
    assert buffer[offset + rows.numel() :].tolist() == [7] * (2 - offset)


def test_strided_ids_and_scale() -> None:
    video, (token, clip) = make_video(3, 2, 4), some_tokens()
    scale, shift = affine(6)
    got = gather_tubes(video, token[::3], clip[::3], 2, 4, scale[::2], shift[1::2])
    expected = gather_tubes_ref(
        video, token[::3].clone(), clip[::3].clone(), 2, 4, scale[::2].clone(), shift[1::2].clone()
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_into_a_buffer(dtype: torch.dtype) -> None:
    video, (token, clip) = make_video(3, 2, 4), some_tokens()
    buffer = torch.full((25, 96), 7, dtype=dtype)
    gather_into(buffer[1:-1], video, token, clip, 2, 4)
    assert torch.equal(buffer[1:-1], gather_tubes_ref(video, token, clip, 2, 4).to(dtype))
    assert bool((buffer[[0, -1]] == 7).all())


@pytest.mark.parametrize(("name", "bad"), [("token_idx", 12), ("token_idx", -1), ("clip_idx", 2), ("clip_idx", -1)])
def test_an_id_out_of_range_is_refused_before_anything_is_written(name: str, bad: int) -> None:
    ids = dict(zip(("token_idx", "clip_idx"), some_tokens(), strict=True))
    ids[name][9] = bad
    out = torch.zeros(23, 96, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"{name}: got {bad} at 9"):
        gather_into(out, make_video(3, 2, 4), **ids, tubelet=2, patch=4)
    assert not out.any()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"video": torch.zeros(2, 3, 4, 12, 8, dtype=torch.int32)}, TypeError, "video"),
        ({"video": torch.zeros(3, 4, 12, 8)}, ValueError, "video"),
        ({"video": torch.zeros(2, 3, 4, 13, 8)}, ValueError, "video"),
        ({"tubelet": 3}, ValueError, "tubelet=3"),
        ({"patch": 0}, ValueError, "patch=0"),
        ({"token_idx": torch.zeros(23, dtype=torch.int64)}, TypeError, "token_idx"),
        ({"clip_idx": torch.zeros(22, dtype=torch.int32)}, ValueError, "clip_idx"),
        ({"scale": torch.ones(3)}, ValueError, "scale"),
        ({"scale": torch.ones(2), "shift": torch.ones(3)}, ValueError, "scale"),
        ({"scale": torch.ones(3), "shift": torch.ones(3, dtype=torch.float64)}, ValueError, "shift"),
        ({"scale": torch.ones(3), "shift": torch.ones(3), "out_dtype": torch.uint8}, ValueError, "out_dtype"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], text: str) -> None:
    token, clip = some_tokens()
    right = {"video": make_video(3, 2, 4), "token_idx": token, "clip_idx": clip, "tubelet": 2, "patch": 4}
    with pytest.raises(error, match=text):
        gather_tubes(**right | change)


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (torch.zeros(22, 96), ValueError),
        (torch.zeros(96, 23).T, ValueError),
        (torch.zeros(23, 96, dtype=torch.float16), TypeError),
    ],
    ids=["shape", "strides", "dtype"],
)
def test_a_wrong_buffer_is_named(out: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="out"):
        gather_into(out, make_video(3, 2, 4), *some_tokens(), 2, 4)


def test_gradients_reach_float_pixels_and_scale() -> None:
    video, (token, clip) = make_video(3, 2, 4, torch.float32).requires_grad_(), some_tokens()
    scale, shift = (t.requires_grad_() for t in affine(3))
    gather_tubes(video, token, clip, 2, 4, scale, shift).sum().backward()
    seen = torch.zeros(2, 12).index_put_((clip.long(), token.long()), torch.ones(23), accumulate=True)
    per_pixel = seen.view(2, 1, 2, 3, 2).repeat_interleave(2, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    torch.testing.assert_close(video.grad, per_pixel * scale.detach().view(3, 1, 1, 1))
    torch.testing.assert_close(scale.grad, (per_pixel * video.detach()).sum((0, 2, 3, 4)))


def test_opcheck() -> None:
    video, ids = make_video(3, 2, 4), some_tokens()
    torch.library.opcheck(gather._gather_op, (video, *ids, 2, 4, None, None, torch.uint8, False))
    torch.library.opcheck(gather._gather_op, (video, *ids, 2, 4, *affine(3), torch.float32, False))
    torch.library.opcheck(gather._fill_op, (torch.empty(23, 96), video, *ids, 2, 4, *affine(3)))
    torch.library.opcheck(gather._union_op, (torch.tensor([0, 2, 1], dtype=torch.int32), bounds(2, 1), 2))


def test_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    video, ids, (scale, shift) = make_video(3, 2, 4), some_tokens(), affine(3)
    compiled = torch.compile(
        lambda v, t, c: gather_tubes(v, t, c, 2, 4, scale, shift).sum(1), backend="aot_eager", fullgraph=True
    )
    expected = gather_tubes_ref(video, *ids, 2, 4, scale, shift).sum(1)
    torch.testing.assert_close(compiled(video, *ids), expected)


def bounds(*lengths: int) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).int()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda views: st.tuples(
            st.just(views),
            st.lists(st.lists(st.sets(st.integers(0, 30)), min_size=views, max_size=views), max_size=4),
        )
    )
)
def test_union_equals_reference(case: tuple[int, list[list[set[int]]]]) -> None:
    views, clips = case
    sequences = [sorted(view) for clip in clips for view in clip]
    keep = torch.tensor([i for sequence in sequences for i in sequence], dtype=torch.int32)
    cu_seqlens = bounds(*map(len, sequences))
    for got, expected in zip(union_rows(keep, cu_seqlens, views), union_rows_ref(keep, cu_seqlens, views), strict=True):
        assert torch.equal(got, expected)


def test_union_leads_every_token_back_to_its_pixels() -> None:
    video, keep = make_video(3, 2, 4), sample_keep(torch.arange(2), 3, (2, 3, 2), 3, 4).view(-1)
    clip = torch.arange(2, dtype=torch.int32).repeat_interleave(18)
    union, union_clip, row_of = union_rows(keep, bounds(*[6] * 6), 3)
    rows = gather_tubes(video, union, union_clip, 2, 4)
    assert rows.shape[0] < keep.shape[0]
    assert torch.equal(rows[row_of], gather_tubes(video, keep, clip, 2, 4))


@pytest.mark.parametrize(
    ("keep", "cu_seqlens", "views", "error", "text"),
    [
        ([1, 1], [0, 2], 1, ValueError, "keep_idx"),
        ([2, 1], [0, 2], 1, ValueError, "keep_idx"),
        ([1, 2], [0, 3], 1, ValueError, "cu_seqlens"),
        ([1, 2], [1, 2], 1, ValueError, "cu_seqlens"),
        ([1, 2], [0, 2, 1, 2], 1, ValueError, "cu_seqlens"),
        ([1, 2], [0, 1, 2], 0, ValueError, "views"),
        ([1, 2], [0, 1, 1, 2], 2, ValueError, "views"),
        ([1, 2], [], 1, ValueError, "views"),
    ],
)
def test_union_names_wrong_arguments(
    keep: list[int], cu_seqlens: list[int], views: int, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        union_rows(torch.tensor(keep, dtype=torch.int32), torch.tensor(cu_seqlens, dtype=torch.int32), views)


# -- on a GPU --


def to_cuda(video: Tensor) -> Tensor:
    """The same strides over a copy of the memory beneath, also where elements share it."""
    memory = video.as_strided((video.untyped_storage().nbytes() // video.element_size(),), (1,), 0).cuda()
    return memory.as_strided(video.shape, video.stride(), video.storage_offset())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "tubelet", "patch"), SHAPES, ids=str)
def test_cuda_gives_the_bits_of_the_cpu(
    channels: int, tubelet: int, patch: int, layout: str, dtype: torch.dtype
) -> None:
    video = layouts(make_video(channels, tubelet, patch, dtype))[layout]
    token, clip = some_tokens()
    for factors in ((), affine(channels)):
        expected = gather_tubes(video, token, clip, tubelet, patch, *factors)
        factors = [t.cuda() for t in factors]
        got = gather_tubes(to_cuda(video), token.cuda(), clip.cuda(), tubelet, patch, *factors)
        assert torch.equal(got.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["planes", "channels last"])
@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_cuda_with_addresses_off_alignment(offset: int, layout: str) -> None:
    video = layouts(make_video(3, 2, 16))[layout]
    memory = torch.empty(video.numel() + offset, dtype=torch.uint8, device="cuda")
    moved = memory[offset:].as_strided(video.shape, video.stride(), offset).copy_(video)
    token, clip = some_tokens()
    expected = gather_tubes(video, token, clip, 2, 16)
    assert torch.equal(gather_tubes(moved, token.cuda(), clip.cuda(), 2, 16).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["planes", "channels last"])
def test_cuda_reads_pinned_host_memory(layout: str) -> None:
    video = layouts(make_video(3, 2, 16))[layout]
    pinned = torch.empty_strided(video.shape, video.stride(), dtype=video.dtype, pin_memory=True).copy_(video)
    token, clip = some_tokens()
    got = gather_tubes(pinned, token.cuda(), clip.cuda(), 2, 16)
    assert torch.equal(got.cpu(), gather_tubes(video, token, clip, 2, 16))
    for elsewhere, ids in ((video, (token.cuda(), clip.cuda())), (video.cuda(), (token, clip))):
        with pytest.raises(ValueError, match="pinned"):
            gather_tubes(elsewhere, *ids, 2, 16)


@pytest.mark.gpu
def test_pinned_rows() -> None:
    token, clip = some_tokens()
    rows = gather_tubes(make_video(3, 2, 4), token, clip, 2, 4, pin=True)
    assert rows.is_pinned()
    assert torch.equal(rows, gather_tubes(make_video(3, 2, 4), token, clip, 2, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["planes", "channels last", "turned"])
def test_cuda_shows_an_id_out_of_range_as_nan(layout: str) -> None:
    video = layouts(make_video(3, 2, 4))[layout].cuda()
    token = torch.tensor([0, 12, -1, 3, 3], dtype=torch.int32, device="cuda")
    clip = torch.tensor([0, 0, 0, 2, -1], dtype=torch.int32, device="cuda")
    rows = gather_tubes(video, token, clip, 2, 4, out_dtype=torch.float32)
    assert bool(rows[1:].isnan().all())
    assert not rows[0].isnan().any()
    assert not gather_tubes(video, token, clip, 2, 4)[1:].any()


@pytest.mark.gpu
def test_cuda_does_not_wait_for_the_device() -> None:
    video, (token, clip) = make_video(3, 2, 16).cuda(), (ids.cuda() for ids in some_tokens())
    scale, shift = (t.cuda() for t in affine(3))
    torch.cuda.set_sync_debug_mode("error")
    try:
        gather_tubes(video, token, clip, 2, 16, scale, shift)
    finally:
        torch.cuda.set_sync_debug_mode("default")
