"""Recomputed activations: values and gradients of a model that keeps everything, in less memory."""
import pytest, torch
from test_packing import SMALL, example, numbers
from transformers import AutoModelForCausalLM, LlamaConfig

from weighted_mtp import recomputation
from weighted_mtp.config import load_config
from weighted_mtp.files import UserError
from weighted_mtp.models import build_first_error_model, build_policy, build_ratio_model, build_value_model
from weighted_mtp.recomputation import recompute_blocks
from weighted_mtp.step_memory import deep_peak

LORA = dict(r=2, alpha=4, dropout=.3, target_modules=['q_proj', 'v_proj', 'up_proj', 'down_proj'])
BUILD = dict(policy=lambda b, *how: build_policy(b, 4, *how), ratio=build_ratio_model, mlp=build_value_model,
             first_error=build_first_error_model)

def trained(kind, tuning): # with B of the adapters not 0
    torch.manual_seed(0)
    model = BUILD[kind](AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)), tuning, LORA).train()
    model.config.use_cache = False
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1*torch.randn_like(p))
    return model

@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('how', [(1, False), (2, False), (1, True), (2, True)])
@pytest.mark.parametrize('tuning', ['full', 'lora'])
@pytest.mark.parametrize('kind', BUILD)
def test_gradients_are_the_same(kind, tuning, how, packed, monkeypatch):
    monkeypatch.setattr(recomputation, '_LONG', 16) # the blocks here are 32 wide
    def found(how=None):
        model = trained(kind, tuning)
        if packed: model.use_packing(10)
        if how: recompute_blocks(model, *how)
        torch.manual_seed(1) # of dropout
        return numbers(model, kind, *example())
    torch.testing.assert_close(found(how), found(), rtol=0, atol=0)

@pytest.mark.parametrize('pipeline, tuning', [('baseline', 'lora'), ('baseline', 'full'), ('critic', 'lora')])
def test_selective_is_between_all_and_nothing(pipeline, tuning):
    "By a traced step: about half of what is kept otherwise, as with every second block."
    def activations(*how):
        c = load_config(f'configs/{pipeline}/{pipeline}_micro.yaml', [
            'model.backbone=micro', 'model.hidden_size=256', 'model.n_layers=4', f'model.tuning={tuning}',
            'dataset.max_length=128', 'training.batch_size=4', *(f'training.{o}' for o in how)])
        return deep_peak(c, exact=True)['activations']
    nothing, second, products, everything = (activations(*how) for how in (
        ['gradient_checkpointing=false'], ['gradient_checkpointing=true', 'recompute_every=2'],
        ['gradient_checkpointing=true', 'selective_checkpointing=true'], ['gradient_checkpointing=true']))
    assert everything < .5*products and products < .75*nothing
    assert second < .75*nothing and products < 1.2*second

def test_compiled_blocks_are_refused():
    with pytest.raises(UserError, match='training.selective_checkpointing cannot tell'):
        load_config('configs/baseline/baseline.yaml',
                    ['training.selective_checkpointing=true', 'training.compile=true'])
