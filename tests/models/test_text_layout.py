"""The layout of an embedding: what a family packs comes out again, and what may be learned."""

import pytest
import torch
from lods.models import TextLayout


@pytest.mark.parametrize("pooled", [0, 3, 4, 9])
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_packed_comes_out_again(pooled, masked):
    layout = TextLayout(6, 4, pooled, masked)
    tokens = torch.randn(2, 6, 4)
    vector = torch.randn(2, pooled) if pooled else None
    mask = torch.tensor([[True] * 6, [True, False] * 3]) if masked else None
    packed = layout.pack(tokens, vector, mask)
    assert packed.shape == (2, *layout.shape)
    found = layout.unpack(packed)
    # what is under the mask is not kept
    kept = torch.ones(2, 6) if mask is None else mask.float()
    assert torch.equal(found.tokens, tokens * kept[..., None])
    assert (found.pooled is None) if vector is None else torch.equal(found.pooled, vector)
    assert (found.mask is None) if mask is None else torch.equal(found.mask, mask)


def test_a_blend_is_of_those_texts_in_which_a_token_counts():
    layout = TextLayout(3, 4, masked=True)
    one, two = torch.randn(2, 1, 3, 4)
    masks = torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])
    packed = 0.25 * layout.pack(one, mask=masks[0]) + 0.75 * layout.pack(two, mask=masks[1])
    found = layout.unpack(packed)
    assert found.weights.tolist() == [[1, 0.25, 0]] and found.mask.tolist() == [[True, True, False]]
    torch.testing.assert_close(found.tokens[:, 0], 0.25 * one[:, 0] + 0.75 * two[:, 0])
    torch.testing.assert_close(found.tokens[:, 1], one[:, 1])
    bias = found.bias()
    torch.testing.assert_close(bias.exp(), torch.tensor([[[1, 0.25, 0]]]))
    assert bias[0, 0, 2] == -10_000
    more = found.followed_by(torch.ones(1, 2, 4)).bias()
    assert torch.equal(more, torch.cat([bias, torch.zeros(1, 1, 2)], dim=2))


def test_parts_of_other_sizes_are_refused():
    layout = TextLayout(6, 4, 3)
    with pytest.raises(ValueError, match=r"pooled of a text: none, not \(3,\)"):
        layout.pack(torch.zeros(1, 6, 4))
    with pytest.raises(ValueError, match=r"tokens of a text: \(5, 4\), not \(6, 4\)"):
        layout.pack(torch.zeros(1, 5, 4), torch.zeros(1, 3))


def test_what_may_be_learned():
    layout = TextLayout(2, 4, pooled=3, masked=True)
    rows = {what: layout.learnable(what).sum(1).tolist() for what in ("all", "tokens", "pooled")}
    assert rows == {"all": [4, 4, 3, 0], "tokens": [4, 4, 0, 0], "pooled": [0, 0, 3, 0]}
    with pytest.raises(ValueError, match="takes no pooled vector"):
        TextLayout(2, 4).learnable("pooled")


def test_compact_parts_have_the_tokens_that_count_first_and_no_more_rows_than_needed():
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    tokens = torch.randn(2, 4, 3)
    parts = TextLayout(4, 3, masked=True).unpack(
        TextLayout(4, 3, masked=True).pack(tokens, mask=mask)
    )
    found = parts.compact()
    assert found.mask.tolist() == [[True, True, True], [True, False, False]]
    assert torch.equal(found.tokens[0], tokens[0, [0, 2, 3]])
    assert torch.equal(found.tokens[1, 0], tokens[1, 1])
    assert torch.equal(found.weights, found.mask.float())
    whole = TextLayout(4, 3).unpack(tokens)
    assert whole.compact() is whole
