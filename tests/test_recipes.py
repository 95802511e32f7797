"""Every recipe of the zoo resolves to what is written down in recipes.json, one line each, so that a change of a recipe is a deliberate one.

Renew the file after such a change with `python tests/test_recipes.py` and read its diff."""
import dataclasses, json, sys
from pathlib import Path
import pytest
from vidlab.train import RunConfig, config_from, list_recipes, read_recipe

STORED = Path(__file__).with_name('recipes.json')
# the joins that pages and README speak of
JOINED = ['msrvtt9k_meanP_b32+compat', 'msrvtt9k_meanP_b32+patch3d', 'msrvtt9k_stan_b32+stan_compat', 'ssv2_tdsclip_b16+tdsclip_compat', 'ssv2_tdsclip_b16+unfrozen',
          'k400_videomamba_s_f8+videomamba_compat', 'k400_videomamba_m_pretrain+videomamba_pretrain_compat', 'lvu_videomamba_scene+lvu_windows', 'lvu_videomamba_like_ratio+lvu_windows',
          'yttemporal_tvts+tvts_compat']

def resolved(): return {n: read_recipe(n) for n in sorted([*list_recipes(), *JOINED])}

def write(): STORED.write_text('{\n' + ',\n'.join(f'{json.dumps(n)}: {json.dumps(d, sort_keys=True)}' for n, d in resolved().items()) + '\n}\n', encoding='utf-8')

def test_recipes_resolve_as_written_down():
    stored, now = json.loads(STORED.read_text(encoding='utf-8')), resolved()
    assert sorted(stored) == sorted(now), 'recipes came or went: python tests/test_recipes.py'
    assert {n: {k: (stored[n].get(k), d.get(k)) for k in {*stored[n], *d} if stored[n].get(k) != d.get(k)} for n, d in now.items() if stored[n] != d} == {}

if __name__ == '__main__': write()
