"""Encoders of a model as files for other runtimes: programs of torch.export (.pt2) and ONNX, for batches of any size. Pixels go in
as they are decoded and vectors of length one come out, of a classifier its logits. Each file is compared with the model."""
import sys
from pathlib import Path
if not __package__: sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # run as a script from a checkout
from data_tools.arguments import Param, pairs, parser_of

EPILOG = """examples:
  export.py shapes_seqTransf exported                       all encoders of the newest run of a recipe
  export.py shapes_seqTransf exported --parts text --int8   also an int8 text tower, and what it costs on the test split
  export.py k400.pth exported --options recipe=k400_videomamba_m16 --forms pt2

ONNX needs: pip install vidlab[export]

exit code: 0 written; 1 packages are missing; 2 no such source, or an encoder that cannot be written"""


def export(source: Param('anything that vidlab.load takes: a run, a recipe, a file, a name'),
           out: Param('folder'),
           parts: Param('text image video logits (default: all that the model has)', nargs='+') = None,
           forms: Param('pt2 onnx', nargs='+') = ('pt2', 'onnx'),
           int8: Param('also an int8 text tower, with its loss of R@1', bool) = False,
           options: Param('for vidlab.load, as name=value: recipe, or model with its options', nargs='+') = ()) -> dict:
    "Write and compare"
    from vidlab.export import export as write
    from vidlab.ready import load
    return write(load(source, device='cpu', **pairs(options)), out, parts, forms, int8)


def main(argv=None) -> int:
    "Command line; returns the exit code"
    args = vars(parser_of(export, __doc__, EPILOG).parse_args(argv))
    try: report = export(**args)
    except ImportError as e: return print(f'export: {e}', file=sys.stderr) or 1
    except (ValueError, OSError) as e: return print(f'export: {e}', file=sys.stderr) or 2
    from vidlab.export import told
    print(told(report))
    print(f'{args["out"]}: ' + ', '.join(sorted(p.name for p in Path(args['out']).iterdir() if not p.name.startswith('.'))))
    return 0


if __name__ == '__main__': sys.exit(main())
