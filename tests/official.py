"""Miniatures of the public data sets, each in the form in which its owners, or the authors of a system, publish it.

A function writes a few clips and whole annotation files below a folder and says which words of a recipe name them."""
import csv, io, json, os, pickle, tarfile
from pathlib import Path

from conftest import encode
from vidlab.data.names import shipped_names

ANSWERS = 'a man talks about his new car', 'two people cook in a kitchen', 'a dog runs over the grass', 'someone plays the guitar'
YOUTUBE = '-7kMO5nZ0sE', '_3tVpZQVPFU', 'v_8KUaGWqBk', 'q1dgUjK-2uw', 'Zt1mMz1y9xY'


def make_clips(folder, n=4):
    "Short clips that differ, and a long one"
    short = [encode(folder/f'{i}.mp4', 16, 96, 72, 8, light=lambda t, i=i: 40*i + 6*t % 256) for i in range(n)]
    return short + [encode(folder/'long.mp4', 128, 64, 48, 4)]


def put(clip, path):
    "The clip under another name"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists(): os.link(clip, path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


def dump(path, what): write(path, json.dumps(what))


def table(path, rows, sep=','):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='', encoding='utf-8') as f: csv.writer(f, delimiter=sep, lineterminator='\n').writerows(rows)


def pictures(folder, name, n=12):
    "A folder of pictures that are counted from 1"
    from PIL import Image
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(1, n + 1): Image.new('RGB', (96, 72), (20*i, 90, 60)).save(folder/name.format(i))


# text and video

def msrvtt(d, clips):
    "Annotations as CLIP4Clip hands them out, the videos as the owners do"
    ids = [f'video{i}' for i in (0, 1, 2, 3, 7020, 7021)]
    for i, v in enumerate(ids): put(clips[i % 4], d/'videos'/'all'/f'{v}.mp4')
    said = [dict(caption=f'{c} in clip {v[5:]}', video_id=v, sen_id=n) for n, (v, c) in enumerate((v, c) for v in ids for c in ANSWERS[:2])]
    videos = [dict(category=9, url='https://www.youtube.com/watch?v=9lZi22qLlEo', video_id=v, start_time=137.72, end_time=149.44, split='train', id=i) for i, v in enumerate(ids)]
    dump(d/'MSRVTT_data.json', dict(info=dict(year='2016', version='1.0'), videos=videos, sentences=said))
    table(d/'MSRVTT_train.9k.csv', [['video_id'], *([v] for v in ids[:4])])
    table(d/'MSRVTT_train.7k.csv', [['video_id'], *([v] for v in ids[:3])])
    table(d/'MSRVTT_JSFUSION_test.csv', [['key', 'vid_key', 'video_id', 'sentence'], *([f'ret{i}', f'msr{v[5:]}', v, ANSWERS[i]] for i, v in enumerate(ids[4:]))])
    return dict(data_path=d, video_root=d/'videos'/'all')


def msvd(d, clips):
    "Lists and pickled captions as CLIP4Clip hands them out, the videos as the owners do"
    ids = ['-4wsuPCjDBc_5_15', '-7KMZQEsJW4_205_208', '-8y1Q0rA3n8_108_115', '-DKuLYNhKV8_10_15', '-_hbPLsZvvo_18_25']
    for i, v in enumerate(ids): put(clips[i % 4], d/'YouTubeClips'/f'{v}.avi')
    for s, part in dict(train=ids[:3], val=ids[3:4], test=ids[4:]).items(): write(d/f'{s}_list.txt', '\n'.join(part) + '\n')
    with open(d/'raw-captions.pkl', 'wb') as f: pickle.dump({v: [c.split() for c in ANSWERS[:3]] for v in ids}, f)
    return dict(data_path=d, video_root=d/'YouTubeClips')


def lsmdc(d, clips):
    "Six fields between tabs without a header; a folder for each film"
    films = '0001_American_Beauty', '1004_Juno', '3009_BATTLE_LOS_ANGELES'
    names = [f'{f}_00.0{i}.51.926-00.0{i}.54.129' for i, f in enumerate(films*2)]
    for i, n in enumerate(names): put(clips[i % 4], d/'videos'/films[i % 3]/f'{n}.avi')
    file = dict(train='LSMDC16_annos_training.csv', val='LSMDC16_annos_val.csv', test='LSMDC16_challenge_1000_publictect.csv')
    for s, part in dict(train=names[:3], val=names[3:4], test=names[4:]).items():
        text = ['"SOMEONE" opens the door.', 'She looks at "the boss", and smiles.', "SOMEONE's car stops."]
        write(d/file[s], ''.join(f'{n}\t00:00:51.926\t00:00:54.129\t00:00:51.926\t00:00:54.129\t{text[i]}\n' for i, n in enumerate(part)))
    return dict(data_path=d, video_root=d/'videos')


def activitynet(d, clips):
    "The owners' captions and names of files, the lists of ids of CLIP4Clip; a video is gone"
    ids = [f'v_{v}' for v in YOUTUBE]
    for i, v in enumerate(ids[:4]): put(clips[i], d/'videos'/f'{v}.{("mp4", "mkv", "webm", "mp4")[i]}')
    said = {v: dict(duration=2., timestamps=[[0, 1.1], [1, 2]], sentences=[ANSWERS[0], ' ' + ANSWERS[1]]) for v in ids}
    for s, part, file in (('train', [*ids[:2], ids[4]], 'train.json'), ('val', ids[2:4], 'val_1.json')):
        dump(d/f'{s}_ids.json', part)
        dump(d/file, {v: said[v] for v in part})
    return dict(data_path=d, video_root=d/'videos', missing='drop')


DIDEMO = ['12090392@N02_13482799053_87ef417396.mov', '17897472@N00_5160288647_51d6eb7c77.m4v', '50625609@N02_2719108775_ecbe2e6a0c.avi',
          '61415053@N02_8435224364_ab6ae2d6ab.mov', '91668415@N00_5201411569_6a6f8d5e0b.mp4', '12090392@N02_13482799053_87ef417397.3gp']

def _didemo(d, clips):
    for i, v in enumerate(DIDEMO): put(clips[i % 4], d/'videos'/v)
    return dict(train=DIDEMO[:3], val=DIDEMO[3:4], test=DIDEMO[4:])


def didemo(d, clips):
    "Descriptions of moments, as the owners hand them out, and the lists of CLIP4Clip"
    for s, part in _didemo(d, clips).items():
        write(d/f'{s}_list.txt', '\n'.join(part) + '\n')
        rows = [dict(annotation_id=10*n + i, description=c, dl_link='https://www.flickr.com/video_download.gne?id=1', num_segments=6, times=[[i, i]]*4, video=v)
                for i, c in enumerate(ANSWERS[:2]) for n, v in enumerate(part)]
        dump(d/f'{s}_data.json', rows)
    return dict(data_path=d, video_root=d/'videos')


def didemo_stan(d, clips):
    "A JSON from file to captions, as STAN's loader reads it"
    for s, part in _didemo(d, clips).items(): dump(d/f'{s}.json', {v: list(ANSWERS[:2]) for v in part})
    return dict(data_path=d/'{split}.json', video_root=d/'videos')


def _webvid(n=5): return [(str(1000 + 17*i), f'{i:06d}_{i + 50:06d}', c) for i, c in enumerate((*ANSWERS, '"Happy" dog, running'))][:n]


def webvid(d, clips):
    "The owners' CSV; a folder for each page, a video is gone"
    for i, (v, page, _) in enumerate(_webvid(4)): put(clips[i], d/'videos'/page/f'{v}.mp4')
    rows = [[v, f'https://ak.picdn.net/shutterstock/videos/{v}/preview/stock-footage.mp4', 'PT00H00M20S', page, c] for v, page, c in _webvid()]
    for s in ('train', 'val'): table(d/f'results_10M_{s}.csv', [['videoid', 'contentUrl', 'duration', 'page_dir', 'name'], *rows])
    return dict(data_path=d/'results_10M_{split}.csv', video_root=d/'videos')


def webvid_shards(d, clips):
    "Tar shards as video2dataset writes them"
    d.mkdir(parents=True, exist_ok=True)
    for k in range(2):
        with tarfile.open(d/f'{k:05d}.tar', 'w') as tar:
            for i, (v, page, c) in enumerate(_webvid(4)[2*k:2*k + 2]):
                key = f'{k:05d}{i:04d}'
                said = dict(videoid=v, page_dir=page, caption=c, key=key, status='success', error_message=None)
                for end, data in (('json', json.dumps(said).encode()), ('mp4', Path(clips[i]).read_bytes()), ('txt', c.encode())):
                    info = tarfile.TarInfo(f'{key}.{end}')
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return dict(data='shards', data_path=d, video_root='')


def webvid_tvts(d, clips):
    "The lists of TVTS: caption and path without an extension between tabs, below a header; a folder for each split"
    for s in ('train', 'val'):
        for i, (v, page, _) in enumerate(_webvid(4)): put(clips[i], d/s/page/f'{v}.mp4')
        write(d/f'webvid_{s}.tsv', ''.join(f'{a}\t{b}\n' for a, b in [('caption', 'path'), *((c, f'{page}/{v}') for v, page, c in _webvid())]))
    return dict(data_path=d/'webvid_{split}.tsv', video_root=d/'{split}')


def cc3m_tvts(d, clips):
    "The lists of TVTS: caption and file, which downloaders save without an extension"
    from PIL import Image
    (d/'training').mkdir(parents=True, exist_ok=True)
    names = [f'{i}_{7*i + 12345}' for i in range(4)]
    for i, n in enumerate(names): Image.new('RGB', (120, 90), (60*i, 80, 99)).save(d/'training'/n, 'JPEG')
    said = ['sculpture by person', '"the end" , said the sign', 'a tower at night', 'hills in the "morning']
    write(d/'cc3m_train.tsv', ''.join(f'{a}\t{b}\n' for a, b in [('caption', 'file'), *zip(said, names)]))
    return dict(data_path=str(d/'cc3m_train.tsv'), video_root=str(d/'training'))


def webvid_cc3m(d, clips):
    "The two data sets of TVTS's second stage"
    return webvid_tvts(d/'webvid', clips) | dict(more=cc3m_tvts(d/'cc3m', clips))


def yttemporal(d, clips):
    "The list of TVTS; the annotations of YT-Temporal-180M, a file for each video; a video is gone"
    words = [dict(word=w, time=.6*i) for i, w in enumerate('so today we are going to build a small table from old wood and some nails'.split()*3)]
    said = dict(info=dict(display_id='', duration=32., title='a table'), subtitles=words, denoised=[dict(cleanasr=' '.join(o['word'] for o in words))])
    for s, part in dict(train=[*YOUTUBE[:2], YOUTUBE[4]], val=YOUTUBE[2:4]).items():
        for i, v in enumerate(part):
            if v != YOUTUBE[4]: put(clips[-1], d/'subset_87'/'data'/f'{v}.mp4')
            dump(d/'subset_87'/'annotations'/f'{v}.json', said)
        write(d/f'yttemporal_{s}.csv', '\n'.join(['Name', *(f'subset_87/data/{v}.mp4' for v in part)]) + '\n')
    return dict(data_path=d/'yttemporal_{split}.csv', video_root=d)


# classes

KINETICS = 'abseiling', 'air drumming', "massaging person's head", 'zumba'      # some of 400

def _kinetics(split): # (class, id, start) of a split; the last is gone
    return [(c, v[:-2] + split[:2], 10*i) for i, (c, v) in enumerate(zip((*KINETICS, KINETICS[0]), YOUTUBE))]


def kinetics_owners(d, clips):
    "The CSV of the owners, the files as they are usually stored"
    for s in ('train', 'val', 'test'):
        rows = _kinetics(s)
        table(d/f'{s}.csv', [['label', 'youtube_id', 'time_start', 'time_end', 'split'], *([c, v, a, a + 10, s] for c, v, a in rows)])
        for i, (c, v, a) in enumerate(rows[:4]): put(clips[i], d/'videos'/s/f'{v}_{a:06d}_{a + 10:06d}.mp4')
    return dict(data='kinetics', data_path=d/'{split}.csv', video_root=d/'videos')


def _kinetics_list(d, clips, name, sep, folder, spell=lambda c: c, splits=('train', 'val', 'test')):
    "Lists of paths and class numbers"
    number = {c: i for i, c in enumerate(shipped_names('kinetics400'))}
    for s in splits:
        rows = [(f'{spell(c)}/{v}_{a:06d}_{a + 10:06d}.mp4', number[c]) for c, v, a in _kinetics(s)]
        write(d/name.format(split=s), ''.join(f'{p}{sep}{n}\n' for p, n in rows))
        for i, (p, _) in enumerate(rows[:4]): put(clips[i], d/folder.format(split=s)/p)
    return dict(data_path=d/name, video_root=d/folder)


def kinetics_videomamba(d, clips): return _kinetics_list(d, clips, '{split}.csv', ',', 'videos')


def kinetics_videomae(d, clips):
    "VideoMAE's: called CSV, but between path and number there is a space"
    return _kinetics_list(d, clips, '{split}.csv', ' ', 'videos', lambda c: c.replace(' ', '_').replace("'", ','))


def kinetics_mmaction(d, clips):
    "As mmaction2 prepares it: a folder for each of two splits, names of classes without spaces"
    return _kinetics_list(d, clips, 'kinetics400_{split}_list_videos.txt', ' ', 'videos_{split}', lambda c: c.replace(' ', '_'), ('train', 'val'))


SOMETHING2 = 'Approaching something with your camera', 'Pushing something from left to right', 'Pushing something from right to left', 'Tearing something into two pieces'
SOMETHING1 = 'Holding something', 'Pushing something from left to right', 'Pushing something from right to left', 'Tearing something into two pieces'

def _something2(d):
    "The three JSON files of the owners; (id, class) of each split"
    names = shipped_names('something2')
    dump(d/'labels'/'labels.json', {c: str(i) for i, c in enumerate(names)})
    parts = {}
    for k, (s, file) in enumerate((('train', 'train'), ('val', 'validation'))):
        parts[s] = [(str(78000 + 100*k + i), c) for i, c in enumerate(SOMETHING2)]
        dump(d/'labels'/f'{file}.json', [dict(id=v, label=c.replace('something', 'a cup').lower(), template=c.replace('something', '[something]'), placeholders=['a cup'])
                                         for v, c in parts[s]])
    dump(d/'labels'/'test.json', [dict(id='1420')])
    return parts


def something2(d, clips):
    "Version 2 as its owners publish it: JSON and .webm"
    for part in _something2(d).values():
        for i, (v, _) in enumerate(part): put(clips[i], d/'20bn-something-something-v2'/f'{v}.webm')
    return dict(data_path=d/'labels', video_root=d/'20bn-something-something-v2')


def something2_frames(d, clips):
    "The same with folders of pictures"
    for part in _something2(d).values():
        for v, _ in part: pictures(d/'frames'/v, 'img_{:05d}.jpg')
    return dict(data_path=d/'labels', video_root=d/'frames', template='img_{:05d}.jpg')


def something2_lists(d, clips):
    "The lists of TVTS and mmaction2: file and number"
    number = {c: i for i, c in enumerate(shipped_names('something2'))}
    for s, part in _something2(d).items():
        for i, (v, _) in enumerate(part): put(clips[i], d/'videos'/f'{v}.webm')
        write(d/f'sthv2_{s}_list_videos.txt', ''.join(f'{v}.webm {number[c]}\n' for v, c in part))
    return dict(data_path=d/'sthv2_{split}_list_videos.txt', video_root=d/'videos')


def something1(d, clips):
    "Version 1 as its owners publish it: CSV between semicolons, folders of pictures"
    write(d/'something-something-v1-labels.csv', '\n'.join(shipped_names('something1')) + '\n')
    for k, s in enumerate(('train', 'validation')):
        rows = [(str(100 + 10*k + i), c) for i, c in enumerate(SOMETHING1)]
        write(d/f'something-something-v1-{s}.csv', ''.join(f'{v};{c}\n' for v, c in rows))
        for v, _ in rows: pictures(d/'20bn-something-something-v1'/v, '{:05d}.jpg')
    return dict(data_path=d, video_root=d/'20bn-something-something-v1')


def ucf101(d, clips):
    "The lists of the owners; of 101 folders three are there"
    write(d/'ucfTrainTestlist'/'classInd.txt', ''.join(f'{i} {c}\r\n' for i, c in enumerate(shipped_names('ucf101'), 1)))
    there = [f'{c}/v_{c}_g0{g}_c01.avi' for g in (1, 8) for c in ('Archery', 'HorseRiding', 'YoYo')]
    for i, p in enumerate(there): put(clips[i % 4], d/'UCF-101'/p)
    number = {c: i for i, c in enumerate(shipped_names('ucf101'), 1)}
    for n in (1, 2, 3):
        write(d/'ucfTrainTestlist'/f'trainlist0{n}.txt', ''.join(f'{p} {number[p.split("/")[0]]}\r\n' for p in there[3:]))
        write(d/'ucfTrainTestlist'/f'testlist0{n}.txt', ''.join(f'{p}\r\n' for p in there[:3]))
    return dict(data_path=d/'ucfTrainTestlist', video_root=d/'UCF-101')


def hmdb51(d, clips):
    "The lists of the owners, one for each class and fold; of 51 folders three are there"
    for c in shipped_names('hmdb51'):
        clip = {f'{name}_{c}_u_nm_np1_ba_goo_{i}.avi': use for i, (name, use) in enumerate((('April_09', 1), ('#20_Rhythm', 2), ('Faith!_(Rewards)', 0)))}
        for n in (1, 2, 3): write(d/'testTrainMulti_7030_splits'/f'{c}_test_split{n}.txt', ''.join(f'{p} {use} \n' for p, use in clip.items() if c in ('cartwheel', 'ride_bike', 'wave')))
        for i, p in enumerate(clip):
            if c in ('cartwheel', 'ride_bike', 'wave'): put(clips[i], d/'hmdb51_org'/c/p)
    return dict(data_path=d/'testTrainMulti_7030_splits', video_root=d/'hmdb51_org')


def breakfast(d, clips):
    "The lists of ViS4mer; the videos as the owners hand them out"
    number = {c: i for i, c in enumerate('cereals coffee tea pancake friedegg scrambledegg sandwich juice milk salat'.split())}
    for k, s in enumerate(('train', 'test')):
        p = f'P{47 + k}'
        rows = [(f'{p}-cam01-{p}_cereals', 'cereals'), (f'{p}-stereo-{p}_tea_ch0', 'tea'), (f'{p}-webcam02-{p}_salat', 'salat')]
        table(d/f'{s}.csv', [['file_name', 'duration', 'action', 'class_id'], *([v, 46, c, number[c]] for v, c in rows)])
        for i, (v, _) in enumerate(rows): put(clips[i], d/'BreakfastII_15fps_qvga_sync'/f'{v.replace("-", "/")}.avi')
    return dict(data_path=d, video_root=d/'BreakfastII_15fps_qvga_sync')


def coin(d, clips):
    "COIN.json; a folder for each task, as its script downloads them; a video is gone"
    names, said = shipped_names('coin'), {}
    for i, v in enumerate(YOUTUBE):
        k = (0, 17, 131, 179, 17)[i]
        said[v] = {'duration': 2., 'class': names[k], 'video_url': f'https://www.youtube.com/embed/{v}', 'start': .5, 'annotation': [dict(id='212', segment=[.5, 1.], label='take it out')],
                   'subset': ('training', 'testing')[i % 2], 'end': 1.6, 'recipe_type': k}
        if i < 4: put(clips[i], d/'videos'/str(k)/f'{v}.mp4')
    dump(d/'COIN.json', dict(database=said))
    return dict(data_path=d/'COIN.json', video_root=d/'videos')


LVU = dict(relationship=['0 friend', '2 husband_wife'], way_speaking=['1 confronts', '4 threatens'], scene=['2 school', '5 restaurant'], director=['0 nm0000229', '5 nm0001675'],
           genre=['0 Comedy', '3 Thriller-Horror'], writer=['0 nm0000175', '6 nm0001392'], year=['4 1970', '8 2010'], view_count=['12345', '67'], like_ratio=['90 10', '45 5'])

def lvu(d, clips):
    "The lists of ViS4mer, a folder for each topic; a video is gone"
    table(d/'lvu_durations.csv', [['videoid', 'duration'], *([v, 32 if i == 0 else 2] for i, v in enumerate(YOUTUBE))])
    for i, v in enumerate(YOUTUBE[:4]): put(clips[-1 if i == 0 else i], d/'videos'/f'{v}.mp4')
    for topic, said in LVU.items():
        head = dict(view_count='view_count', like_ratio='like_count dislike_count').get(topic, 'class_id class_name')
        for k, s in enumerate(('train', 'val', 'test')):
            ids = (YOUTUBE[0], YOUTUBE[1], YOUTUBE[4]) if s == 'train' else (YOUTUBE[k], YOUTUBE[3])
            write(d/topic/f'{s}.csv', '\n'.join([f'{head} youtube_id imdb_id', *(f'{said[i % 2]} {v} tt0407304' for i, v in enumerate(ids))]) + '\n')
    return dict(data_path=d, video_root=d/'videos')
