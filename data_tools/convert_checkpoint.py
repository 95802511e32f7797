"""Write the weights of a run, or of any file that is read here, in the form in which the published code of its system reads them:
CLIP4Clip's pytorch_model.bin, STAN's mmengine file, TDS-CLIP's last_model.pt, the checkpoint of VideoMamba, TVTS's with `module.`
before every name. Weights alone go over, no state of an optimiser; averaged weights where the run has such."""
import sys
from pathlib import Path
if not __package__: sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # run as a script from a checkout
from data_tools.arguments import Param, parser_of

EPILOG = """examples:
  convert_checkpoint.py outputs/msrvtt9k_meanP_b32/20260101-120000_ab12cd pytorch_model.bin.0
  convert_checkpoint.py ssv2_tdsclip_b16 tdsclip.pt                 the newest finished run of a recipe

exit code: 0 written; 2 no such run, or no published form for its model"""


def convert_checkpoint(source: Param('a run folder, a checkpoint folder, a recipe (its newest finished run) or a file'),
                       out: Param('file to write'),
                       force: Param('replace a file that is there', bool) = False) -> int:
    "Write weights for the published code"
    import torch
    from vidlab.core import atomic_write
    from vidlab.ready import load
    if Path(out).exists() and not force: raise FileExistsError(f'{out} is there already: give another name or --force')
    state = load(source, device='cpu').task.model.official_file()
    with atomic_write(out, 'wb') as f: torch.save(state, f)
    print(f'{out}: {Path(out).stat().st_size/2**20:.1f} MiB')
    return 0


def main(argv=None):
    args = vars(parser_of(convert_checkpoint, __doc__, EPILOG).parse_args(argv))
    try: return convert_checkpoint(**args)
    except (ValueError, OSError) as e: return print(e, file=sys.stderr) or 2


if __name__ == '__main__': sys.exit(main())
