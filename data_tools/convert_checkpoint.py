"""Write the weights of a run, or of any file that is read here, in another form:
official     as the published code of its system reads them: CLIP4Clip's pytorch_model.bin, STAN's mmengine file, TDS-CLIP's
             last_model.pt, the checkpoint of VideoMamba, TVTS's with `module.` before every name (the default)
vidlab       a folder with weights and a card: from then on `vidlab.load` needs to be told nothing
safetensors  one file with our names
open_clip    the image and text tower alone, for open_clip
Weights alone go over, no state of an optimiser; averaged weights where the run has such. What was written is read again and
compared with what went in."""
import sys
from pathlib import Path
if not __package__: sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # run as a script from a checkout
from data_tools.arguments import Param, pairs, parser_of

EPILOG = """examples:
  convert_checkpoint.py outputs/msrvtt9k_meanP_b32/20260101-120000_ab12cd pytorch_model.bin.0
  convert_checkpoint.py ssv2_tdsclip_b16 tdsclip.pt                 the newest finished run of a recipe
  convert_checkpoint.py k400_stan.pth kept --to vidlab --recipe k400_stan_b16         a published file
  convert_checkpoint.py ViT-B-32 kept --to vidlab --options pretrained=laion.safetensors   a CLIP of open_clip
  convert_checkpoint.py msrvtt9k_meanP_b32 towers.safetensors --to open_clip

exit code: 0 written; 2 no such source, or no such form for its model"""


def convert_checkpoint(source: Param('a run folder, a checkpoint folder, a recipe (its newest finished run), a file, or an architecture of open_clip'),
                       out: Param('file to write, for vidlab a folder'),
                       to: Param('official | vidlab | safetensors | open_clip') = 'official',
                       recipe: Param('of a published file: the recipe that it is from') = None,
                       model: Param('of a published file, instead: the name of its model') = None,
                       options: Param('of that model, as name=value; of an architecture pretrained=FILE', nargs='+') = (),
                       force: Param('replace what is there', bool) = False) -> int:
    "Write weights in another form"
    from vidlab.export import said, write_weights
    from vidlab.ready import load
    if Path(out).exists() and not force: raise FileExistsError(f'{out} is there already: give another name or --force')
    ready = load(source, device='cpu', **{k: v for k, v in dict(recipe=recipe, model=model).items() if v}, **pairs(options))
    report = write_weights(ready, out, to, force)
    if (read := ready.model.report) is not None:
        print(f'read    {read}')
        for theirs, ours, what in [r for r in read.rows if r[2] != 'loaded'][:40]: print(f'  {what}: {theirs or ours}')
    print(said(report))
    return 0


def main(argv=None):
    args = vars(parser_of(convert_checkpoint, __doc__, EPILOG).parse_args(argv))
    try: return convert_checkpoint(**args)
    except (ValueError, OSError) as e: return print(e, file=sys.stderr) or 2


if __name__ == '__main__': sys.exit(main())
