"""The explorer of moments: dockhand killed at any of them, the disk full at any write.

What an act changes is found by looking: Python tells a profile function of each call of
a function of C, and a run that nothing disturbs notes after which of them the disk, or
what docker, git and init hold, is another than before. Later runs are killed there.
What one effect leaves the next one finds: so that is before and after each of them.
"""
import errno
import functools
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import traceback
from contextlib import contextmanager

import pytest

import dockhand as dh
from dockhand import Failure, Key
from machine import (
    FILES, FILES_2, MAIN, ONE_CRON, ONE_DATA, ONE_NAMED, ONE_TYPES, ONE_WEB, SHA_2,
    TWO_CRON, TWO_DATA, TWO_NAMED, TWO_TYPES, TWO_WEB, VOLUMES, ZERO, Machine, half_deployed,
    keys_text)

HELD = '''images containers jobs commits refs served count volumes networks
    ordered caught certified nodes services'''.split()
DATA = 'blog--data'
LOOKING = 'fspath read stat lstat fstat statvfs listdir readlink fdopen __exit__'.split()
FREEING = 'unlink remove rmdir truncate chmod chown fchmod fchown'.split()
GIT = 'git --git-dir=/home/git/blog.git '
HALVES = ('rm -rf', GIT + '--work')      # these commands are killed half-way too
FULL = ('docker build', 'docker tag', 'docker create', 'docker run', 'docker start', 'mkdir',
        'docker network create', GIT + '--work', GIT + 'update-ref refs')
TWICE = 'docker (build|run|start)|timeout|nginx|kill'
MOST = 8                            # processes at a time

# (files of release 1, of release 2): of a job app, of a web app that is handed over, of
# one that is stopped first for its VOLUME, of a job app that becomes a plain one, of a
# web app that has https, of one with a worker beside its web process, of one that has a
# crontab, of one with a worker that runs on several machines
KINDS_OF_APP = {'job': (FILES, FILES_2), 'web': (ONE_WEB, TWO_WEB),
                'data': (ONE_DATA, TWO_DATA), 'turned': (FILES, TWO_WEB),
                'https': (ONE_NAMED, TWO_NAMED), 'types': (ONE_TYPES, TWO_TYPES),
                'cron': (ONE_CRON, TWO_CRON), 'machines': (ONE_TYPES, TWO_TYPES)}

def deploy_two(machine):
    dh.deploy(machine.app, 'anna', MAIN, machine.refs.get(MAIN, ZERO), SHA_2)

ACTS = {'first': deploy_two, 'deploy': deploy_two,
        'rollback': lambda machine: dh.cmd_rollback(machine.app),
        'config': lambda machine: dh.cmd_config(machine.app, 'A=2', 'B=3'),
        'https': lambda machine: dh.cmd_https(machine.host, 'blog'),
        'stop': lambda machine: dh.cmd_stop(machine.app),
        'start': lambda machine: dh.cmd_start(machine.app),
        'recover': lambda machine: dh.cmd_recover(machine.host),
        'export': lambda machine: exported(machine, os.devnull),
        'import': lambda machine: imported(machine, machine.root + '.stream')}
RUNS = [('first', 'none'), ('first', 'upstart'), ('deploy', 'systemd'),
        ('deploy', 'upstart'), ('rollback', 'none'), ('rollback', 'upstart')] + [
    (act, 'none ' + kind) for kind in ('web', 'data')
    for act in ('first', 'deploy', 'rollback')] + [
    ('deploy', 'upstart turned'), ('rollback', 'upstart turned'),
    ('config', 'none web'), ('config', 'upstart job'), ('https', 'none https'),
    ('deploy', 'none https'), ('rollback', 'none https'), ('deploy', 'none types'),
    ('rollback', 'none types')] + [
    (act, 'none cron') for act in ('first', 'deploy', 'rollback')] + [
    (act, 'none machines') for act in ('deploy', 'rollback')] + [
    ('deploy', 'none web late'), ('rollback', 'none web late'),
    ('deploy', 'none types late'), ('deploy', 'upstart job late')]

@contextmanager
def led(fd, path, flags):
    """A standard stream leads to a file inside a `with`."""
    kept, opened = os.dup(fd), os.open(path, flags, 0o600)
    os.dup2(opened, fd)
    os.close(opened)
    try:
        yield
    finally:
        os.dup2(kept, fd)
        os.close(kept)

def exported(machine, path, *names):
    """Export these apps, or all, to a file; its bytes."""
    with led(1, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC):
        dh.cmd_export(machine.host, *names)
    with open(path, 'rb') as stream:
        return stream.read()

def imported(machine, path, *names):
    with led(0, path, os.O_RDONLY):
        dh.cmd_import(machine.host, *names)

def with_data(machine, files):
    """It lives, and has a volume, and a repository."""
    live = machine.lives(files, A='1')
    machine.write('/home/git/blog.git/config', '')
    machine.volumes += [DATA] * (DATA not in machine.volumes)
    machine.fill(DATA, {'kept': 'of the old server'})
    dh.make_folder(machine.host.path(dh.STREAMS), 0o711)
    return live

def fresh_machine(root, init):
    """A Machine on which dockhand is installed, with the key of the others."""
    machine = Machine(root, init)
    machine.write('/home/git/' + dh.KEYS, keys_text(Key('ssh-ed25519', 'AAAA', 'anna', ())))
    machine.nginx()
    machine.host.nginx.restore('blog', None)
    for path in ('/var/lib/dockhand/apps', '/etc/letsencrypt', VOLUMES):
        dh.make_folder(machine.host.path(path))
    dh.make_folder(machine.host.path(dh.STREAMS), 0o711)
    return machine

def about_to(act, init, folder):
    """A Machine on which an act can begin. init: and the kind of the app after it, and
    `late` where what is begun beside something else is done as late as can be"""
    one, two = KINDS_OF_APP[(init.split() + ['job'])[1]]
    config = {'machines': 'all'} if init.endswith(' machines') else {}
    root = os.path.join(folder, 'machine')
    if act == 'import':
        old = Machine(root + '-old', init.split()[0])
        with_data(old, one)
        exported(old, root + '.stream')
        shutil.rmtree(old.root)
        return fresh_machine(root, init.split()[0])

    machine = Machine(root, init.split()[0])
    if init.endswith(' machines'):
        machine.spread('web2', 'web3')
    if act == 'first':
        machine.nginx()
        machine.host.nginx.restore('blog', None)
        dh.make_folder(machine.host.path('/var/lib/dockhand/apps'))
    elif act == 'export':
        with_data(machine, one)
    elif act in ('deploy', 'config', 'stop', 'start', 'https'):
        machine.lives(one, A='1', **config)
        if act == 'start':
            dh.cmd_stop(machine.app)
    else:
        machine.app.set_link('live', half_deployed(machine, files=(one, two), **config))
        dh.cmd_recover(machine.host)
    machine.commits[SHA_2] = two
    if init.endswith(' https') and act != 'https':
        dh.cmd_https(machine.host, 'blog')
    machine.host.nginx.passed.clear()       # an act is a process of its own
    machine.is_late = init.endswith(' late')
    return machine

class Moments(object):
    """A profile function. `reached` gets each moment before and after a call that may
    change something: (when, what, the how many-eth). A command is one such call."""
    def __init__(self, reached, names=None):
        self.reached, self.names, self.counts, self.command = reached, names, {}, ''

    def __call__(self, frame, event, called):
        if event in ('call', 'return'):
            if frame.f_code is Machine.__call__.__code__:
                line = ' '.join(frame.f_locals['argv'])
                line = line.replace(frame.f_locals['self'].root, '')
                line = re.sub('streams/[^/ ]*', 'streams/MARK', line)
                line = re.sub('timeout -k 9 [0-9]+', 'timeout -k 9 LEFT', line)
                self.command = line if event == 'call' else ''
                self.moment(event, line)
            elif (frame.f_code is Machine.docker_start.__code__
                  and self.command.startswith('docker run')):
                self.moment(event, 'start: ' + self.command)
        elif self.names and called.__name__ not in self.names or not may_change(called):
            return
        elif not self.command:
            self.moment(event, '%s in %s' % (called.__name__, frame.f_code.co_name))
        elif self.command.startswith(HALVES):
            self.moment(event, '%s: %s' % (called.__name__, self.command))

    def moment(self, event, what):
        moment = ('before' if event.endswith('call') else 'after', what)
        self.counts[moment] = self.counts.get(moment, 0) + 1
        self.reached(moment + (self.counts[moment],))

def may_change(called):
    """Whether a function of C is the system's or a file's, and not just for looking."""
    return called.__name__ not in LOOKING and (
        getattr(called, '__module__', None) == 'posix' or called.__name__ == 'open'
        or hasattr(getattr(called, '__self__', None), 'fileno'))

@contextmanager
def watched(watch):
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.settrace(None)
        sys.setprofile(None)

def held(machine):
    return dict((name, getattr(machine, name)) for name in HELD)

def moments_of(act, machine, keep=None):
    """([moment after which something is different], [any moment]) of an act that goes on;
    `keep` is called at each of the former, and first of all."""
    changes, moments, last = [], [], []
    def look(moment):
        moments.append(moment)
        if moment[0] == 'after':
            now = [machine.files(), json.dumps(held(machine), sort_keys=True)]
            now += [machine.read(dh.LOCKS + '/' + name)
                    for name in dh.list_folder(machine.host.path(dh.LOCKS))]
            if now != last:
                changes.append(moment)
                last[:] = now
                keep and keep()
    look(('after', 'nothing', 0))
    with watched(Moments(look)):
        ACTS[act](machine)
    return changes[1:], moments

def kill(act, machine, at):
    """Run an act in a process that is killed at a moment. What docker, git and init hold
    then is handed on: they are no part of it."""
    path = machine.root + '.held'
    def reached(moment):
        if moment == at:
            with open(path, 'wb') as target:
                pickle.dump(held(machine), target, 2)
            os._exit(0)
    child = os.fork()
    if not child:
        try:
            with watched(Moments(reached, [re.match(r'\w*', at[1]).group()])):
                ACTS[act](machine)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, 'this moment did not come: %s' % (at,)
    with open(path, 'rb') as source:
        vars(machine).update(pickle.load(source))

STORE = '/var/lib/dockhand/apps/blog'

def standing(machine):
    """All that must be one release's, as {what: text}: times do not count, nor does it
    that a failed release is remembered, that nginx has opened a log to test a file, or
    that a service which runs nothing is gone: a rollback makes it anew, if it is kept."""
    found = machine.files('/run', '/var/log/nginx')
    for path in [STORE, STORE + '/releases']:       # they may hold failed ones alone
        found.pop(path, None)
    for path in [path for path in found if path.endswith('/release.json')]:
        record = json.loads(dh.to_text(found[path][0]))
        if record['failed']:
            del found[path], found[os.path.dirname(path)]
        else:
            record.update(time=0, seconds=record['seconds'] is not None, turn=0,
                          revived=None)
            found[path] = (json.dumps(record, sort_keys=True),) + found[path][1:]
    found.update((tag, image['Id']) for tag, image in machine.images.items())
    found.update((name, each['Image'] + each['policy'] * each['State']['Running'])
                 for name, each in machine.containers.items() if name[:3] != 'job')
    kept = [(release.commit, sorted(release.config.items()))
            for release in machine.app.kept()]
    can_be_made = [dh.container_name(release) for release in machine.app.kept()]
    found.update(refs=sorted(machine.refs.items()), running=machine.running(), kept=kept,
                 jobs=sorted(machine.jobs), served=sorted(machine.served.items()),
                 machines=sorted((name, sorted(node['labels'].items()),
                                  sorted(node['images'].items()))
                                 for name, node in machine.nodes.items()),
                 services=sorted((name, service['count'], service['port'])
                                 for name, service in machine.services.items()
                                 if service['count'] or name not in can_be_made),
                 certified=machine.certified)
    return dict((name, str(value)) for name, value in found.items())

def unnumbered(state):
    """A state whose live release has no number, nor the port that it has by that."""
    live = re.search(r'releases/(\d+)', state[STORE + '/live'])
    named = r'releases/|blog:|blog--|blog\.|dockhand/|"number": |\b2000'
    pattern = r'(%s)%s\b' % (named, live.group(1))
    return dict([re.sub(pattern, r'\1N', text) for text in item]
                for item in state.items())

def differences(now, *states):
    """In what a state differs from the nearest of others."""
    return min([sorted('%s: %s, not %s' % (key, now.get(key), state.get(key))
                       for key in set(now) | set(state) if now.get(key) != state.get(key))
                for state in states], key=len)

def explore(act, init, folder):
    """(changes, moments, states that may stand afterwards: before, after, git done)."""
    machine = about_to(act, init, folder)
    states = [standing(machine)]
    changes, moments = moments_of(act, machine)
    states.append(standing(machine))
    machine.refs[MAIN] = machine.app.live().commit
    return changes, moments, states + [standing(machine)]

def after_a_kill(act, init, states, at, folder):
    """What is wrong after a kill and `recover`, or if the same is pushed again then."""
    machine = about_to(act, init, folder)
    kill(act, machine, at)
    dh.cmd_recover(machine.host)
    now = standing(machine)
    wrong = differences(now, *states)
    if wrong or not is_new(machine, act, folder):
        return wrong
    dh.cmd_recover(machine.host)
    if act not in ('first', 'deploy') or standing(machine) != now:
        return differences(standing(machine), now)
    deploy_two(machine)
    machine.refs[MAIN] = SHA_2
    return differences(unnumbered(standing(machine)), unnumbered(states[-1]))

def is_new(machine, act, folder):
    """Whether no other run has come to this state: from here all goes the same way."""
    state = [standing(machine), machine.app.numbers(), act, machine.init]
    name = hashlib.sha1(dh.to_bytes(json.dumps(state, sort_keys=True))).hexdigest()
    try:
        os.mkdir(os.path.join(os.path.dirname(folder), name))
    except OSError:
        return False
    return True

def after_a_second_kill(act, init, states, at, folder):
    """What is wrong after a kill, a kill of `recover` at any moment, and `recover`. The
    second ones are copies of what lies there at each moment: a kill leaves just that."""
    machine, twins = about_to(act, init, folder), []
    kill(act, machine, at)
    changes, _ = moments_of('recover', machine, lambda: twins.append(copied(
        machine, os.path.join(folder, str(len(twins))))))
    for twin in twins:
        dh.cmd_recover(twin.host)
    return ['after %s: %s' % (moment[1], each)
            for moment, twin in zip([at] + changes, twins)
            for each in differences(standing(twin), *states)]

def copied(machine, root):
    shutil.copytree(machine.root, root, symlinks=True)
    twin = Machine(root, machine.init)
    for folder, folders, names in os.walk(twin.host.path('/home/git')):
        for name in folders + names:
            twin.give(os.path.join(folder, name)[len(root):])
    vars(twin).update(pickle.loads(pickle.dumps(held(machine), 2)))
    return twin

def full_disk(machine, at, wanting):
    """Moments: the call at one gets no space, nor from then on any that is `wanting`."""
    def reached(moment):
        if moment == at or moment[:2] in wanting and machine.broken:
            if wanting:
                machine.broken.update(dict.fromkeys(FULL, 99))
                sys.settrace(go_on)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    def go_on(*_):                  # a profile function that raises is not called again
        if sys.getprofile() is None:
            sys.setprofile(watch)
    watch = Moments(reached, None if wanting else [at[1].split()[0]])
    return watch

def after_a_full_disk(act, init, states, at, wanting, folder):
    """What is wrong after an act for which the disk was full, and `recover` if it stayed
    full until the act was over, or the act was done but for what `recover` may do."""
    machine, said = about_to(act, init, folder), ''
    try:
        with watched(full_disk(machine, at, wanting)):
            ACTS[act](machine)
    except (Failure, EnvironmentError) as error:
        said = str(error)
    machine.broken.clear()
    # `release 2 is live, but: ...; recover tries again`; so it does with certificates
    if wanting or not said or act == 'https':
        dh.cmd_recover(machine.host)
    return differences(standing(machine), *states) + [said] * ('\n' in said)

def writes(changes, moments):
    """The moments before calls that want space on the disk."""
    found = [moment[1:] for moment in changes if moment[1].split()[0] not in FREEING]
    return [moment for moment in moments if moment[0] == 'before' and (
        moment[1] == 'fsync in replace_file'
        or moment[1:] in found and re.match(r'\w+ in \w+\Z', moment[1]))]

def in_parallel(tasks, folder):
    """Do [task] in some processes, since they sleep; [its result, or how it failed]."""
    os.mkdir(folder)
    results = {}
    paths = [os.path.join(folder, 'process%d' % each) for each in range(MOST)]
    children = [in_a_process(tasks, number, path) for number, path in enumerate(paths)]
    for child, path in zip(children, paths):
        os.waitpid(child, 0)
        with open(path, 'rb') as source:
            results.update(pickle.load(source))
    return [results[number] for number in range(len(tasks))]

def in_a_process(tasks, first, path):
    """Do every MOST-th task, each in a folder of its own; leave the results in a file."""
    child = os.fork()
    if child:
        return child
    results, null = {}, os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for number in range(first, len(tasks), MOST):
        folder = '%s.%d' % (path, number)
        os.mkdir(folder)
        try:
            results[number] = tasks[number](folder)
        except BaseException:
            results[number] = [traceback.format_exc()]
        shutil.rmtree(folder)
    with open(path, 'wb') as target:
        pickle.dump(results, target, 2)
    os._exit(0)

def trials_of(act, init, changes, moments, states):
    """[(what happens, act, init, moment, task)] of one act."""
    spots = writes(changes, moments)
    kills = [moment for moment in changes if not moment[1].endswith(' in locked')]
    seconds = set(kills[-7::3] + [each for each in kills if re.match(TWICE, each[1])])
    wanting = set(moment[:2] for moment in spots)
    return [(what, act, init, at, functools.partial(task, act, init, states, at, *more))
            for what, task, moments, more in (
                ('kill', after_a_kill, kills, ()),
                ('second kill', after_a_second_kill, seconds, ()),
                ('full', after_a_full_disk, spots, ((),)),
                ('stays full', after_a_full_disk, spots, (wanting,))) for at in moments]

def folder_with_room(folders, wanted=dh.SPACE + 128):
    """The first of some folders that has so many MB free: a Machine's disk is its file
    system, and docker's /dev/shm has 64 MB. None has: a skip, or in CI a failure."""
    for folder in folders:
        if os.access(folder, os.W_OK):
            found = os.statvfs(folder)
            if found.f_bavail * found.f_frsize >= wanted * 10 ** 6:
                return folder
    (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)(
        '%d MB are free on none of %s' % (wanted, ', '.join(folders)))

@pytest.fixture(scope='module')
def trials(request):
    """{(what happens, act, init): {moment: what is wrong then}}; all of them at a time,
    in memory where that is a file system too, since much of the time goes into fsync.
    Two Pythons try another fifth each; `-m 'whole or not whole'` all."""
    parts = 1 if request.config.option.markexpr else 5
    folder = tempfile.mkdtemp(dir=folder_with_room(['/dev/shm', tempfile.gettempdir()]))
    try:
        explored = in_parallel([functools.partial(explore, *run) for run in RUNS],
                               os.path.join(folder, 'undisturbed'))
        failed = [found[0] for found in explored if isinstance(found, list)]
        assert not failed, failed[0]
        tried = [each for run, found in zip(RUNS, explored)
                 for each in trials_of(*(run + tuple(found)))]
        own = sys.version_info[1] + 7 * dh.PYTHON_2    # 2.7 is not 3.7
        now = range(own % parts, len(tried), parts)
        results = dict(zip(now, in_parallel([tried[number][-1] for number in now],
                                            os.path.join(folder, 'tried'))))
    finally:
        shutil.rmtree(folder)
    found = {}
    for number, (what, act, init, at, _) in enumerate(tried):
        found.setdefault((what, act, init), {})[at] = results.get(number)
    return found

def wrong(trials, *kind):
    return dict((at, result) for at, result in trials[kind].items() if result)
