"The command line of a tool from its function: one description of each parameter, in the signature"
import argparse, inspect
from dataclasses import dataclass


@dataclass
class Param:
    "A parameter on the command line; those without a default are positional"
    help: str
    type: type = str    # bool: a switch
    nargs: str = None   # as in argparse


def parser_of(f,             # whose parameters are annotated with `Param`
              about: str,    # what the tool does
              epilog: str    # examples, exit codes
              ) -> argparse.ArgumentParser:
    "Options with their defaults in the help"
    p = argparse.ArgumentParser(f.__name__, description=inspect.cleandoc(about), epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, a in inspect.signature(f).parameters.items():
        o, needed = a.annotation, a.default is a.empty
        if o.type is bool: p.add_argument(f'--{name}', action='store_true', help=o.help)
        else: p.add_argument(name if needed else f'--{name}', type=o.type, nargs=o.nargs, help=o.help + _shown(o, a.default), default=None if needed else a.default)
    return p


def _shown(o, default):
    "The default in words, where there is one and the help does not say it"
    if default in (inspect.Parameter.empty, None, ()) or '(default' in o.help: return ''
    return f' (default: {" ".join(default) if isinstance(default, tuple) else default})'.replace('%', '%%')


def pairs(words: list  # e.g. ['recipe=shapes_stan', 'pretrained=clip.pt']
          ) -> dict:
    "Options as name=value, their values as in YAML"
    import yaml
    for w in words:
        if '=' not in w: raise ValueError(f'--options {w!r}: write name=value')
    return {k: yaml.safe_load(v) for k, _, v in (w.partition('=') for w in words)}
