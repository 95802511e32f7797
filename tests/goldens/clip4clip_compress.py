"""CLIP4Clip's compression script: size, rate and sound of the copies."""
import os, tempfile

import numpy as np

from . import kind


def make_source(path, width, height, fps, frames, audio):
    "A clip as the case describes it"
    import av
    with av.open(path, 'w') as c:
        v = c.add_stream('libx264', rate=fps, options=dict(preset='ultrafast'))
        v.width, v.height, v.pix_fmt = width, height, 'yuv444p' if width % 2 or height % 2 else 'yuv420p'
        a = c.add_stream('aac', rate=16000) if audio else None
        for t in range(frames):
            x = np.full((height, width, 3), 60, np.uint8)
            x[:, t*width//frames:] = 200
            c.mux(v.encode(av.VideoFrame.from_ndarray(x, format='rgb24').reformat(format=v.pix_fmt)))
        c.mux(v.encode(None))
        if a:
            f = av.AudioFrame.from_ndarray(np.zeros((1, int(16000*frames/fps)), 'float32'), format='fltp',
                                           layout='mono')
            f.rate = 16000
            c.mux(a.encode(f)); c.mux(a.encode(None))


@kind('clip4clip', 'compress_video')
def check_compress(case, tensors):
    """Landscape and square: the official size. Portrait: the official command inverts the aspect ratio; the copy
    must follow the fixed rule that the case states (width 224, height 2*trunc(224*h/w/2)). Frame counts depend on the
    ffmpeg version: within 3, as the case says."""
    import av
    from data_tools.compress_videos import compress_file, small_size
    for c in case['cases']:
        i, o = c['input'], c['output']
        w, h = i['width'], i['height']
        short = min(o['width'], o['height']) if w >= h else o['width']
        want = (o['width'], o['height']) if w >= h else (short, 2*int(short*h/w/2))
        got = small_size(w, h, short)
        assert got == want, f'{w}x{h}: {got}, expected {want}'
        with tempfile.TemporaryDirectory() as tmp:
            src, dst = os.path.join(tmp, 'a.mp4'), os.path.join(tmp, 'b.mp4')
            make_source(src, w, h, i['fps'], i['frames'], i['audio'])
            compress_file(src, dst, o['fps'], short)
            with av.open(dst) as f:
                v = f.streams.video[0]
                n = sum(1 for _ in f.decode(v))
                assert (v.width, v.height) == want, f'{w}x{h}: written as {v.width}x{v.height}, expected {want}'
                assert float(v.average_rate) == o['fps'], f'rate {v.average_rate}, expected {o["fps"]}'
                assert bool(f.streams.audio) == o['audio'], 'sound was kept' if f.streams.audio else 'sound is missing'
            assert abs(n - o['frames']) <= 3, f'{w}x{h}: {n} frames, expected {o["frames"]} within 3'
