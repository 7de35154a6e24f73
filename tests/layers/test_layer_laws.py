"""Every law of a layer, on every layer, on every backend."""

from __future__ import annotations

import pytest
from cases import LAYERS, LayerCase, generator, parts

from kfac_np import trees
from kfac_np.backend import Backend, Rng, get_backend
from kfac_np.layers import Activation
from kfac_np.testing import LAYER_LAWS, check_layer

ELEMENTWISE = [case for case in LAYERS if isinstance(case.layer, Activation)]


@pytest.mark.parametrize("law", LAYER_LAWS)
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layer_law(case: LayerCase, law: str, backend: Backend):
    check_layer(case.layer, *case.build(backend), laws=[law])


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layers_of_the_library_have_hessian_products(case: LayerCase):
    # A layer may refuse them, and the law then has nothing to say; ours don't.
    if not all(type(layer).__module__.startswith("kfac_np") for layer in parts(case.layer)):
        return
    params, x = case.host()
    y, cache = case.layer.forward(params, x)
    case.layer.backward_jvp(params, cache, y, x, params, None)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_every_parameter_belongs_to_a_layer_that_is_not_made_of_layers(case: LayerCase):
    for path, p in trees.items(case.host()[0]):
        owner = case.layer.at(path)
        assert owner in parts(case.layer)
        assert owner.children == ()
        shapes = [w.shape for w in trees.leaves(owner.init(Rng(0), get_backend()))]
        assert p.shape in shapes


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e3])
@pytest.mark.parametrize("case", ELEMENTWISE, ids=str)
def test_activation_laws_at_other_sizes(case: LayerCase, size: float, backend: Backend):
    # Far from zero an activation that overflows or cancels shows; NaN breaks any law.
    x = size * generator(case.name).choice([-1.0, 1.0], case.shape) + 0.1
    laws = ["adjointness", "vectors", "take", "layout"]
    check_layer(case.layer, (), backend.asarray(x), laws=laws)
