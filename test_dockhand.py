"""The tests of dockhand, in three layers.

Tables over the functions that decide; a Host in a temporary folder, where a command that
nobody expects fails the test; and, from "The real layer" on, dockhand on fresh servers.
"""
import binascii
import calendar
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import os
import pwd
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import zlib
from collections import Counter
from contextlib import closing, contextmanager

import pytest

import dockhand as dh
from dockhand import Failure, Host, Key, Result

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '.ci'))
pytest.register_assert_rewrite('lab', 'machine', 'moments')
from lab import (
    ALL_THERE, BACK_AGAIN, HERE, KEEP, REAL_WEB, SEED, STANZAS, TINY, WHOLE, Alone, App,
    Busy, Crowd, Database, Fleet, Load, Marked, Plain, Queue, Secured, Server, Typed, Watch,
    Worker, anywhere,
    demand_engine, demand_nginx, demand_tool, drill, drills, everywhere, fresh_servers,
    must, one_in, public_key, run, servers, together, told, until, web_files)
from machine import (
    FILES, FILES_2, GROUP, JOB, JOB_HEADER, MAIN, NGINX_CONF, OF_A_JOB, ONE_CRON,
    ONE_DATA, ONE_TYPES, ONE_WEB, PROXY_HEADER, SHA, SHA_2, SHA_3, SS_HEAD, TWO_CRON,
    TWO_DATA, TWO_NAMED, TWO_TYPES, TWO_WEB, USER, VOLUMES, WEB, ZERO, Beside, Clock,
    Machine, an_app, but, half_deployed, image, keys_text, mode_in, pem, release,
    switch_steps)
from moments import (
    ACTS, RUNS, about_to, differences, explore, exported, folder_with_room,
    fresh_machine, imported, in_parallel, kill, moments_of, standing, trials, with_data, wrong)

SPELLED = {'n': '\n', 'r': '\r', 't': '\t', '0': '\0', 'e': '\x1b', '_': ' ', '\\': '\\'}

def cells(line):
    return tuple(re.sub(r'\\(.)', lambda match: SPELLED[match.group(1)], cell)
                 for cell in re.split(r' *=> *', line.strip()))

def table(names, text, *more):
    """A test for each line of a text: columns parted by =>, characters as in SPELLED."""
    rows = [cells(line) for line in text.strip('\n').split('\n')]
    rows = rows if ',' in names else [row[0] for row in rows]
    return pytest.mark.parametrize(names, rows + list(more))

def each(name, text, *more):
    """A test for each word of a text."""
    return table(name, '\n'.join(text.split()), *more)

def refusal(function, *args):
    """What a function says when it refuses: one line that a terminal can show."""
    with pytest.raises(Failure) as caught:
        function(*args)
    assert re.match(r'[ -~]{1,300}\Z', str(caught.value))
    return str(caught.value)

@contextmanager
def ending(seconds=20):
    """Fails the test where the block does not come to its end: no measure of speed."""
    def give_up(number, frame):
        raise AssertionError('it does not end')
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

HOSTILE = [
    ' ', '\t', '\n', '\r', '\r\n', 'x', '1', '0', '-', 'a ', 'a=', 'A=1 ', '-i', '.',
    '*.', '\\', '\\\n', '"', "'", "'\"", '""', '(', ')', '(?<a>', '[', '$', '${', '$a ',
    '{', '}', 'a{', ';', 'a;', '`', '$(', '#', '/', '../', ':', '://', ',', '~', '\0',
    '\x1b[', '\x1b[1'] + [dh.to_text(data) for data in (b'\xff', b'\xc3\xa9', b'\xe2')]

def hostile(*letters):
    """Texts as large as a file may be, of nothing but the same letters: whatever makes a
    reader look at what it has read before."""
    size = dh.FILE_LIMIT
    # Each of nine Pythons tries another third of what nobody chose.
    return [(repeated * size)[:size]
            for repeated in letters or HOSTILE[sys.version_info[1] % 3::3]]

@pytest.fixture(autouse=True)
def signals_stay():
    """Undoing ignores signals for the rest of a process; here for the rest of a test."""
    kept = [(number, signal.getsignal(number))
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    yield
    for number, handler in kept:
        signal.signal(number, handler)

@pytest.fixture(params=['none', 'upstart'])
def machine(request, tmpdir):
    return Machine(tmpdir, request.param)

@pytest.fixture
def plain(tmpdir):
    return Machine(tmpdir)

def records_of(*numbers):
    """The paths of what stays of failed releases of an app that was never live."""
    folder = '/var/lib/dockhand/apps/blog'
    return set([folder, folder + '/releases']).union(*[
        ['%s/releases/%d' % (folder, number),
         '%s/releases/%d/release.json' % (folder, number)]
        for number in numbers])

def pushed(machine, *commits):
    """Releases of these commits after the first, the last one live; what was before."""
    old = machine.lives(FILES)
    engine = dh.engine_of(machine.app, old)
    before = machine.whole()
    for number, commit in enumerate(commits, 2):
        files = but('docker', 'FROM ' + commit[:3])
        new = machine.release(number, commit, files, 2.5)
        engine.prepare(new)
        for act in switch_steps(machine.host, old, new):
            act()
        engine.settle(new)
        old = new
    machine.app.set_link('live', old)
    machine.refs[MAIN] = commits[-1]
    del machine.done[:]
    return before

# ---- Whatever comes in -----------------------------------------------------------------

# What reads a text of any kind, by name; each gets every one of the hostile texts.
READERS = {
    'ssh command': dh.parse_git_command,
    'path': lambda text: dh.parse_git_command("git-receive-pack '%s'" % text),
    'ref': lambda text: dh.judge_ref(text, SHA, 'main'),
    'branch': lambda text: dh.judge_ref('refs/heads/' + text, SHA, 'main'),
    'app': lambda text: dh.check_app_name('a' + text),
    'key name': lambda text: dh.check_key_name('a' + text),
    'object id': dh.OBJECT_ID.match,
    'keys': dh.parse_public_keys,
    'key': lambda text: dh.parse_public_keys('ssh-rsa' + text),
    'blob': lambda text: dh.parse_public_keys('ssh-rsa AAAA' + text),
    'key file': dh.read_authorized_keys,
    'key line': lambda text: dh.read_authorized_keys('command="x serve a' + text),
    'key options': lambda text: dh.read_authorized_keys('x="a",' + text + ' ssh-rsa '),
    'key rights': lambda text: dh.read_authorized_keys(
        'command="dockhand serve a' + text + '",x ssh-rsa AAAA'),
    'two keys': lambda text: dh.parse_public_keys('ssh-rsa AAAAB ' + text),
    'ssh connection': lambda text: dh.parse_connection('::1 1 ' + text),
    'network': lambda text: dh.check_setting('trust', '10.0.0.0/' + text[:32000]),
    'build': lambda text: dh.StageReader().hear(' --->' + text),
    'build cache': lambda text: dh.read_build_cache('ID:' + text),
    'answer': dh.status_in,
    'setting': lambda text: dh.check_setting('a' + text, ''),
    'domains': lambda text: dh.check_setting('domains', 'a' + text[:32000]),
    'branch name': lambda text: dh.check_setting('branch', 'a' + text[:32000]),
    'port': lambda text: dh.check_setting('port', text[:32000]),
    'release': lambda text: dh.check_setting('release', text[:32000]),
    'quoted release': lambda text: dh.check_setting('release', '"' + text[:32000]),
    'line': lambda text: dh.LineReader().feed(dh.to_bytes(text)),
    'output': dh.plain_line,
    'coloured': lambda text: dh.plain_line('\x1b[' + text),
    'shown': dh.printable,
    'last line': dh.last_line,
    'usage': lambda text: dh.last_line("x\nSee '" + text),
    'nginx': lambda text: says_nginx('nginx: [emerg] ' + text + '!'),
    'nginx -t': lambda text: says_nginx(text + ' in /x:1'),
    'diff': lambda text: Host('/', lambda argv: Result(
        0, '[{}]' if argv[1] == 'inspect' else 'A ' + text, '')).docker.written_files('x'),
    'volume': lambda text: dh.volume_of('shop', text),
    'crontab': dh.parse_crontab,
    'cron line': lambda text: dh.parse_crontab('@daily ' + text),
    'cron time': lambda text: dh.parse_crontab('1' + text),
    'percent': lambda text: dh.unescaped_percents('x' + text),
    'quoted command': dh.quote,
    'health': lambda text: dh.check_text({'Log': [{'ExitCode': 1, 'Output': text}]})}

def says_nginx(text):
    return Host('/', lambda argv: Result(1, '', text)).nginx.problem()

@pytest.mark.parametrize('name', sorted(READERS))
def test_whatever_comes_in_is_read_in_one_pass(name):
    """What takes the square of its length does not end here."""
    for text in hostile():
        with ending():
            try:
                READERS[name](text)
            except Failure as failure:
                assert len(str(failure)) < 1000

def test_an_image_with_every_port_and_a_volume_in_every_folder_is_read_in_one_pass():
    settings = {'ExposedPorts': dict(('%d/tcp' % port, {}) for port in range(1, 65536)),
                'Volumes': dict(('/a/%d' % number, {}) for number in range(65536))}
    with ending():
        port, is_web, volumes = dh.read_image(settings, release())
        job = dh.parse_job('exec docker run --rm blog')
        assert len(dh.check_job(job, 'blog', (), settings['Volumes'])) == 65536
    assert (port, is_web, len(volumes)) == (80, True, 65536)

# ---- Names, ssh commands, refs ---------------------------------------------------------

@each('name', 'ab blog b2 my-app a.b_c-d www.example.org a1-2 bpx git-tools', 'a' * 40)
def test_a_name_is_taken_as_it_is(name):
    assert dh.check_app_name(name) == name

@each('name', r'''. .. a .ssh a/b Upper uP a..b a--b a- -a 1a a:b $(id) * a* blog.git a'b
      a"b a;b my\_app ab\n a\nb \_ab ab\_ a\0b \e[31mred $(touch\_/tmp/x)''',
      '', 'a' * 41, 'a' * 256, dh.to_text(b'ab\xe2\x80\xaecd'),
      dh.to_text(b'bl\xd0\xbeg'), dh.to_text(b'bl\xffg'))
def test_what_is_no_name_is_refused_not_repaired(name):
    assert 'is no name for an app' in refusal(dh.check_app_name, name)

@each('name', 'ubuntu debian alpine python node scratch nginx docker ssh default '
      'networking plan dockhand dockhand-recover')
def test_a_name_that_would_take_the_place_of_another_thing_is_refused(name):
    assert re.search('Dockerfiles start from|the server itself',
                     refusal(dh.check_app_name, name))

@each('name', 'a anna Anna@home.org 1_b-c', 'x' * 64)
def test_a_key_name_is_taken_as_it_is(name):
    assert dh.check_key_name(name) == name

@each('name', r'''-anna .anna a\_b a"b a'b a;b a\nb anna\n a/b .* $(id)''', '', 'x' * 65,
      dh.to_text(b'ann\xc3\xa4'))
def test_what_is_no_key_name_is_refused(name):
    assert 'is no name for a key' in refusal(dh.check_key_name, name)

@table('command, verb, app', '''
    git-receive-pack 'blog.git'  => receive-pack => blog
    git-receive-pack 'blog'      => receive-pack => blog
    git-receive-pack '/blog.git' => receive-pack => blog
    git receive-pack 'blog.git'  => receive-pack => blog
    git-upload-pack 'my.app.git' => upload-pack  => my.app''')
def test_what_git_sends_is_understood(command, verb, app):
    assert dh.parse_git_command(command) == (verb, app)

HOSTILE_COMMANDS = r'''
    id
    bash -i
    \_
    git-receive-pack 'a1';id
    git-receive-pack 'ab' 'cd'
    git-receive-pack 'ab''cd'
    git-receive-pack --help
    git-upload-pack --timeout=1 'ab'
    git-receive-pack ab
    git-receive-pack "ab"
    git-receive-pack 'ab'\n
    git-receive-pack 'ab
    git-receive-pack  'ab'
    \_git-receive-pack 'ab'
    git-upload-archive 'ab'
    destroy ..
    logs /
    serve anna
    scp -t /etc
    apps $(id)
    apps ; id
    logs blog | sh
    apps `id`
    config blog A="
    install
    receive check
    \e]0;x'''

@table('command', HOSTILE_COMMANDS, 'x' * 10240)
def test_any_other_ssh_command_is_not_gits(command):
    assert dh.parse_git_command(command) is None

def by_ssh(machine, command, *words):
    """Run what a key with such rights, called anna, asks for; the exit status."""
    if words or machine.read('/home/git/' + dh.KEYS) is None:
        machine.write('/home/git/' + dh.KEYS, keys_text(Key(*ONE + ('anna', words))))
    os.environ['SSH_ORIGINAL_COMMAND'] = command
    try:
        key, = dh.read_keys(machine.host)
        return dh.receive(machine.host, 'command', 'anna', *key.words) or 0
    finally:
        del os.environ['SSH_ORIGINAL_COMMAND']
        machine.host.asker = None

@table('command', HOSTILE_COMMANDS, 'x' * 10240)
def test_an_ssh_command_that_is_none_of_ours_is_refused_and_does_nothing(plain, command):
    plain.lives(ONE_WEB)
    if command.strip():
        refusal(by_ssh, plain, command, '--admin')
    assert plain.done == []

# What each of the rights may do: to its own app, and to the server
RIGHTS = {(): 'read change', ('blog',): 'read change', ('bl-',): '', ('bb', 'blo-'): '',
          ('blog', '--read-only'): 'read', ('--read-only',): 'read',
          ('--admin',): 'read change admin', ('wiki',): ''}
ASKED = [
    ('apps', 'read'), ('logs blog', 'read'), ('releases blog', 'read'),
    ('config blog', 'read'), ('proxy blog', 'read'), ('https', 'read'),
    ('config blog --values', 'change'), ('config blog A=1', 'change'),
    ('config blog --unset A', 'change'), ('restart blog', 'change'),
    ('stop blog', 'change'), ('start blog', 'change'), ('rollback blog', 'change'),
    ('rebuild blog', 'change'), ('https blog', 'change'), ('https blog --off', 'change'),
    ('https blog --cert', 'change'), ('destroy blog --force', 'change'),
    ('status blog --json', 'read'), ('status', 'read'), ('run blog x', 'change'),
    ('enter blog', 'change'), ('doctor blog', 'read'), ('doctor blog --quiet', 'read'),
    ('doctor --quiet', 'admin'), ('keys --json', 'admin'), ('apps --json', 'read'),
    ('keys', 'admin'), ('upload-key x', 'admin'), ('remove-key x', 'admin'),
    ('doctor', 'admin'), ('recover', 'admin'), ('install', 'root'), ('export', 'root'),
    ('export shop', 'root'), ('import', 'root'), ('uninstall', 'root')]

@pytest.mark.parametrize('words', sorted(RIGHTS))
@pytest.mark.parametrize('command, right', ASKED)
def test_each_command_wants_its_right(plain, monkeypatch, words, command, right):
    called = []
    verbs = [verb._replace(function=lambda *args, **options: called.append(args))
             for verb in dh.COMMANDS]
    monkeypatch.setattr(dh, 'COMMANDS', verbs)
    plain.lives(ONE_WEB)
    may = right in RIGHTS[words].split()
    if 'blog' not in command and right == 'read':
        may = True                              # of what is to be seen, not of blog
    if may:
        assert by_ssh(plain, command, *words) == 0 and len(called) == 1
    else:
        refusal(by_ssh, plain, command, *words)
        assert called == []

@pytest.mark.parametrize('command', [
    command for command, _ in ASKED if 'blog' in command])
@pytest.mark.parametrize('words', [('wiki',), ('wiki', '--read-only'), ('blo-',)])
def test_an_app_of_others_is_told_from_none_by_nothing(plain, words, command):
    words = words if words != ('blo-',) else ('blogs-',)
    missing = refusal(by_ssh, plain, command, *words)
    plain.lives(ONE_WEB)
    plain.write('/home/git/' + dh.KEYS, keys_text(Key(*ONE + ('anna', words))))
    opened = []
    read_file = dh.read_file
    dh.read_file = lambda path: opened.append(path) or read_file(path)
    try:
        assert refusal(by_ssh, plain, command) == missing
    finally:
        dh.read_file = read_file
    assert not [path for path in opened if 'blog' in path]
    assert plain.done == []

NO_NAMES = '''.. . .ssh a/b blog-a/../wiki blog-/../wiki / Upper ../../../../home/git/wiki.git
    ../../../../root/.docker a..b a- a:b * blog-'''.split() + [
        '', 'x' * 256, 'blog\n', '\x1b[31m']

@pytest.mark.parametrize('verb', sorted(
    verb.name for verb in dh.COMMANDS if verb.pattern.startswith(('APP', '[APP]'))))
def test_a_command_is_about_an_app_and_no_path(plain, capfd, verb):
    rights = itertools.cycle([(), ('blog-',), ('blog-', '--read-only'), ('--admin',), ()])
    for app in ('wiki', 'blog-a'):
        other = dh.App(plain.host, app)
        dh.make_folder(other.folder(), 0o700)
        other.save_config({'SECRET': 'hush'})
    plain.write('/home/git/wiki.git/config', '[core] bare = true\n')
    capfd.readouterr()
    for name in NO_NAMES:
        refusal(by_ssh, plain, '%s %s' % (verb, dh.quote(name)), *next(rights))
    assert 'SECRET' not in capfd.readouterr().out and plain.done == []

def test_the_config_of_no_app_is_refused(plain):
    assert 'no app blgo here' in refusal(by_ssh, plain, 'config blgo')

def test_who_waits_for_nginx_is_not_told_for_which_app(plain, capfd):
    with dh.host_lock(plain.host), pytest.raises(Failure):
        with dh.locked(plain.host.path(dh.LOCKS, '.host'), 'x', patience=0):
            pass
    assert '-----> Waiting for a change of nginx, since ' in capfd.readouterr().err

def test_what_is_listed_over_ssh_is_what_a_key_may_see(plain, capfd):
    plain.lives(ONE_WEB)
    for words, there in ((('wiki',), False), (('blo-',), False), (('bl-',), False),
                         (('blog',), True), (('--read-only',), True), (('--admin',), True)):
        capfd.readouterr()
        by_ssh(plain, 'apps', *words)
        by_ssh(plain, '', *words)
        assert ('blog' in capfd.readouterr().out.replace('blo-', '')) == there

def test_who_comes_without_a_command_is_told_who_it_is_and_what_comes_first(plain, capfd):
    plain.lives(ONE_WEB)
    capfd.readouterr()
    assert by_ssh(plain, '', 'bl-', 'blog', '--read-only') == 0
    said = capfd.readouterr().out
    assert said.startswith('You are anna, and may read bl- blog.\n\n')
    assert 'ssh git@HOST logs NAME -f' in said and said.endswith('\nHere now: blog\n')

@pytest.mark.parametrize('words, pushes', [((), True), (('--read-only',), False)])
def test_nobody_is_told_first_of_a_push_that_the_key_may_not(plain, capfd, words, pushes):
    by_ssh(plain, '', *words)
    said = capfd.readouterr().out
    assert ('git push git@HOST:NAME HEAD:main ' in said) == pushes
    assert ('git clone git@HOST:NAME ' in said) != pushes

@pytest.mark.parametrize('words, listed', [
    (('--read-only',), 'doctor config https logs status'), ((), 'doctor run destroy'),
    (('--admin',), 'doctor keys recover')])
def test_help_lists_what_a_key_may_in_one_way_or_another(plain, capfd, words, listed):
    by_ssh(plain, 'help', *words)
    said = re.findall('(?m)^  ([a-z-]+)', capfd.readouterr().out)
    assert set(listed.split()) <= set(said)
    assert ('run' in said) == (words != ('--read-only',))
    assert ('keys' in said) == (words == ('--admin',)) and 'install' not in said

def test_a_key_that_may_not_check_the_server_is_told_that_it_is_about_that(plain):
    assert refusal(by_ssh, plain, 'doctor', 'blog') == (
        'doctor without APP is for keys that were uploaded with --admin')
    assert refusal(by_ssh, plain, 'keys', 'blog').startswith('keys is for keys that ')
    assert refusal(by_ssh, plain, 'config blog A=1', '--read-only').startswith('config is ')

def test_which_dockhand_this_is_can_be_asked_by_ssh(plain, capfd):
    """There ssh takes a word with dashes for an option of its own."""
    assert by_ssh(plain, 'version') == 0
    assert re.match(r'dockhand [0-9a-f]{12}, Python \d', capfd.readouterr().out)

def test_a_prefix_of_names_reaches_what_begins_so(plain, capfd):
    assert 'shop-x' in dh.Reach(['shop-']) and 'shop' not in dh.Reach(['shop-'])
    assert 'shop' in dh.Reach(['shop']) and 'shop-x' not in dh.Reach(['shop'])

@pytest.mark.parametrize('words, said', [
    (('shop-*',), 'is no name for an app'), (('a;b',), 'is no name'), (('-',), 'is no name'),
    (('--admin', '--read-only'), 'leave out what it is to be limited to'),
    (('--admin', 'blog'), 'leave out what'), (('$(id)',), 'is no name'),
    (('shop--',), 'is no name')])
def test_no_right_has_a_letter_that_a_shell_reads(words, said):
    assert said in refusal(dh.check_rights, words)

@contextmanager
def handed_over(host, name, *words):
    """What a key's line with these words has root run, and no more; the words of it."""
    handed, execvpe = [], os.execvpe
    os.execvpe = lambda program, argv, env: handed.extend(argv[3:])
    try:
        dh.serve(host, name, *words)
        yield handed
    finally:
        os.execvpe = execvpe

# As sshd's shell hands it to `serve`, and what it may not do at all where it is that
HAND_WRITTEN = [
    ("serve anna 'blog'", ['blog'], 'blog'), (r'serve anna \"blog\"', ['blog'], 'blog'),
    ('serve anna blog,wiki', ['blog,wiki'], ''), ('serve anna Blog', ['Blog'], ''),
    ('serve anna --readonly', ['--readonly'], ''),
    ('serve anna blog --readonly', ['blog', '--readonly'], ''),
    ('serve anna --readonly blog', ['--readonly', 'blog'], ''),
    ("serve anna '--read-only'", ['--read-only'], 'every app'),
    ('serve anna -- blog', ['--', 'blog'], ''), ('serve anna blog-*', ['blog-x.git'], ''),
    ('serve anna blog_', ['blog_'], ''), ('serve anna $APPS', [], ''),
    ('serve anna $APPS', ['wiki'], ''), ('serve anna blo\'g\'', ['blog'], ''),
    ('serve anna --admin blog', ['--admin', 'blog'], ''),
    ('serve anna --admin --read-only', ['--admin', '--read-only'], ''),
    (r'serve anna \"\"', [''], ''), ('serve anna blog # x', ['blog'], 'blog'),
    ('serve anna blog 2>/dev/null', ['blog'], 'blog'),
    ('serve anna  blog\t', ['blog'], 'blog'), ('serve anna blog; x', ['blog'], 'blog')]

@pytest.mark.parametrize('forced, words, apps', HAND_WRITTEN)
def test_a_line_written_by_hand_lets_nobody_do_more_by_a_command_than_by_a_push(
        plain, capfd, forced, words, apps):
    plain.lives(ONE_WEB)
    plain.write('/home/git/' + dh.KEYS, 'command="/usr/local/bin/dockhand %s" %s x\n' % (
        forced, ' '.join(ONE)))
    before = plain.read('/home/git/' + dh.KEYS)
    with ssh_command(''):
        if apps:
            with handed_over(plain.host, 'anna', *words) as handed:
                assert dh.receive(plain.host, *handed) is None
            assert apps in capfd.readouterr().out.splitlines()[0]
        else:
            refusal(dh.receive, plain.host, 'command', 'anna', *words)
            assert plain.host.asker is None
    with ssh_command("git-upload-pack 'wiki.git'"):
        refusal(dh.serve, plain.host, 'anna', *words or ['$APPS'])
    assert plain.read('/home/git/' + dh.KEYS) == before

def test_each_line_of_a_name_has_its_own_rights(plain, capfd):
    plain.write('/home/git/' + dh.KEYS, keys_text(
        Key(*ONE + ('anna', ('--read-only',))), Key(*TWO + ('anna', ()))))
    for words, said in (((), 'may push and manage every app'),
                        (('--read-only',), 'may read every app')):
        with ssh_command(''):
            dh.receive(plain.host, 'command', 'anna', *words)
        assert said in capfd.readouterr().out

def test_keys_says_of_a_line_written_by_hand_that_it_lets_nobody_in(plain, capfd):
    plain.write('/home/git/' + dh.KEYS, keys_text(Key(*ONE + ('anna', ()))).replace(
        'serve anna', 'serve anna --readonly'))
    dh.cmd_keys(plain.host)
    assert '"--readonly" is no right' in capfd.readouterr().out
    lines = dh.read_authorized_keys(plain.read('/home/git/' + dh.KEYS))
    changed = dh.render_authorized_keys(dh.add_keys(lines, [], 'anna', ('blog',)))
    assert changed == keys_text(Key(*ONE + ('anna', ('blog',))))

@pytest.mark.parametrize('words, command, what', [
    (('wiki',), 'config blog TOKEN=hush', 'config'), (('wiki',), 'config TOKEN=hush', 'config'),
    (('--read-only',), 'destroy blog --force', 'destroy'), ((), 'keys', 'keys')])
def test_a_command_that_a_key_has_no_right_to_is_logged_without_its_words(
        plain, monkeypatch, words, command, what):
    logged = []
    monkeypatch.setattr(dh, 'log', lambda text, *values: logged.append(text % values))
    plain.write('/home/git/' + dh.KEYS, keys_text(Key(*ONE + ('anna', words))))
    refusal(by_ssh, plain, command)
    assert logged == ['%s by anna: refused: it has no right to that' % what]

def test_a_key_that_nobody_uploaded_may_nothing(plain):
    plain.lives(ONE_WEB)
    os.environ['SSH_ORIGINAL_COMMAND'] = 'apps'
    assert 'no key here is called "eve"' in refusal(
        dh.receive, plain.host, 'command', 'eve')
    del os.environ['SSH_ORIGINAL_COMMAND']

def test_a_command_by_ssh_is_logged_under_the_name_of_its_key_and_without_values(
        plain, monkeypatch):
    logged = []
    monkeypatch.setattr(dh, 'log', lambda text, *values: logged.append(text % values))
    plain.lives(ONE_WEB)
    by_ssh(plain, 'config blog TOKEN=hush "OTHER=two words"', 'blog')
    assert logged[-1].startswith('blog: ') and 'hush' not in str(logged)
    assert plain.app.live().by == 'anna'
    assert plain.app.config() == {'TOKEN': 'hush', 'OTHER': 'two words'}

@pytest.mark.parametrize('words, said', [
    ('config:set blog A=1', 'here it is: config APP KEY=VALUE'), ('ps', 'here it is: apps'),
    ('run:detached blog x', 'here it is: run APP'), ('ssh blog', 'here it is: enter APP'),
    ('letsencrypt:enable blog', 'here it is: https APP'), ('scale web=2', 'scale="web=2'),
    ('logs blog --tail', 'not recognized; here it is: -f, or -n N'),
    ('destroy blog -f', 'here it is: --force'), ('xyzzy', '`help` lists them')])
def test_words_of_other_tools_are_answered_with_ours_and_do_nothing(plain, words, said):
    plain.lives(ONE_WEB)
    assert said in refusal(by_ssh, plain, words)
    with pytest.raises(dh.Usage):
        dh.run_command(plain.host, words.split())
    assert plain.done == []

@pytest.mark.parametrize('text, said', [
    ('another: dockhand config blog port=N', 'another: ssh git@HOST config blog port=N'),
    ('sudo dockhand https shop', 'ssh git@HOST https shop'),
    ('`dockhand proxy blog` prints one', '`ssh git@HOST proxy blog` prints one'),
    ('dockhand: a line of ours', 'dockhand: a line of ours'),
    ('sudo dockhand recover', 'sudo dockhand recover'),
    ('sudo dockhand install; dockhand upload-key x', 'sudo dockhand install; dockhand '
     'upload-key x'), ('/var/lib/dockhand config', '/var/lib/dockhand config')])
def test_commands_are_named_to_a_pusher_as_they_are_typed_by_ssh(text, said):
    assert dh.typed_by_ssh(text) == said

def test_every_word_of_other_tools_is_none_of_ours():
    names = [verb.name for verb in dh.COMMANDS]
    assert not [name for name in names for pattern, _ in dh.FOREIGN
                if re.match('(?:%s)\\Z' % pattern, name)]

def test_help_lists_what_a_key_may_use(plain, capfd):
    for words, there, not_there in (((), 'restart', 'keys'), (('--read-only',), 'logs',
                                    'restart'), (('--admin',), 'keys', 'install')):
        capfd.readouterr()
        by_ssh(plain, 'help', *words)
        listed = [line.split()[0] for line in capfd.readouterr().out.splitlines()[2:]]
        assert there in listed and not_there not in listed

@pytest.mark.parametrize('text, words', [
    ('a "b c" d', ['a', 'b c', 'd']), ("a 'b $x' *", ['a', 'b $x', '*']), ('', []),
    ('a\\ b', ['a b']), ('a\nb', ['a', 'b']), ('a #b', ['a', '#b'])])
def test_a_command_is_split_as_a_shell_does_and_nothing_is_expanded(text, words):
    assert dh.split_words(text) == words

@each('path', '''../../tmp/x / //blog ~/blog .ssh/authorized_keys blog.git.git blog.git/
      --upload-pack=x''', '')
def test_a_repository_path_that_is_no_name_is_refused(path):
    command = "git-receive-pack '%s'" % path
    assert 'is no name for an app' in refusal(dh.parse_git_command, command)

@table('ref, branch, verdict', '''
    refs/heads/main   =>      => deploy
    refs/heads/master =>      => deploy
    refs/heads/main   => main => deploy
    refs/heads/live   => live => deploy
    refs/heads/plan   =>      => plan
    refs/heads/plan   => main => plan
    refs/tags/main    =>      => store
    refs/tags/v1      => main => store''')
def test_a_ref_is_deployed_planned_or_stored(ref, branch, verdict):
    assert dh.judge_ref(ref, SHA, branch or None) == verdict

@table('ref, branch, said', r'''
    refs/heads/feature    => main   => to deploy this: git push REMOTE HEAD:main
    refs/heads/feature    =>        => only main or master is deployed
    refs/heads/main       => master => git push REMOTE HEAD:master
    refs/heads/main\n     => main   => only main
    refs/heads/           => main   => only main
    refs/heads/$(id)      => main   => only main
    refs/for/\e[2J        => main   => refs/for/?[2J is refused
    refs/replace/1111     => main   => push a branch or a tag
    refs/for/master       => main   => push a branch or a tag
    refs/dockhand/1       => main   => push a branch or a tag
    refs/notes/commits    =>        => push a branch or a tag
    --upload-pack=x       =>        => push a branch or a tag
    $(id)                 =>        => $(id) is refused
    ;id                   =>        => ;id is refused
    HEAD                  =>        => HEAD is refused''')
def test_any_other_ref_is_refused_with_a_sentence(ref, branch, said):
    assert said in refusal(dh.judge_ref, ref, SHA, branch or None)

@table('ref, new', 'refs/heads/main => %s\nrefs/heads/other => %s' % (ZERO, '0' * 64))
def test_a_branch_is_not_deleted(ref, new):
    assert 'branches are not deleted here' in refusal(dh.judge_ref, ref, new, 'main')

@each('text', r'%s\n 1 %s1 %s --%s' % (SHA, SHA, 'A' * 40, SHA[2:]), '')
def test_an_object_id_has_40_or_64_digits(text):
    assert not dh.OBJECT_ID.match(text)
    assert dh.OBJECT_ID.match(SHA) and dh.OBJECT_ID.match('a' * 64)

@table('ref, branch', '''
    refs/tags/main   =>
    refs/tags/master =>
    refs/tags/plan   =>
    refs/tags/live   => live''')
def test_a_tag_called_like_the_branch_is_refused_with_what_to_type(ref, branch):
    said = refusal(dh.check_tag, ref, branch or None)
    assert said.endswith('git push REMOTE TAG^{}:refs/heads/' + ref[10:])

@table('ref, branch', '''
    refs/tags/v1     =>
    refs/tags/main   => live
    refs/tags/mains  =>''')
def test_any_other_tag_is_stored(ref, branch):
    dh.check_tag(ref, branch or None)

# ---- Keys ------------------------------------------------------------------------------

ED = 'AAAAC3NzaC1lZDI1NTE5AAAAIK4+kLRETSYxUlOKaUhzNbuHMIC/LwTGdkKAcZn1RFqi'
ED_2 = 'AAAAC3NzaC1lZDI1NTE5AAAAILUy0eQwM2Gn1sZkaZgW8vaRQkLp3+ixcjBOHeRgplhV'
RSA = (
    'AAAAB3NzaC1yc2EAAAADAQABAAAAgQCcVr/aHawI2z/Bu5B6v4dBj07ddledGxrcbi6BZu8+v98TQOOQBK'
    'IJTNOJE8Ozk9beCjxtifgp29DjOUuiTC9ZcIs6TyJufXIBrSESh4VW231gVTtHEmQazLtesbX4+YdlfOIs'
    '80W8cd9bbgB4p0sI1S87oVkxL8/LAFiOIFX0vQ==')
ONE, TWO, THREE = ('ssh-ed25519', ED), ('ssh-ed25519', ED_2), ('ssh-rsa', RSA)
LINE, LINE_2, LINE_3 = ['%s %s a@b' % key for key in (ONE, TWO, THREE)]

@pytest.mark.parametrize('text, keys', [
    (LINE, [ONE]), (LINE + '\r\n', [ONE]), ('ssh-ed25519 ' + ED, [ONE]),
    ('# mine\n\n%s\n' % LINE, [ONE]), (LINE_3 + '\n', [THREE]),
    ('  ssh-ed25519\t%s  anna of "home"; rm -rf /' % ED, [ONE]),
    (LINE + '\r\n' + LINE_2 + '\r\n', [ONE, TWO]), (LINE + '\r' + LINE_2, [ONE, TWO])])
def test_public_keys_are_read_one_a_line(text, keys):
    assert dh.parse_public_keys(text) == keys

@table('text, said', r'''
    => no key came in: cat ~/.ssh/id_ed25519.pub (or id_rsa.pub)
    \_\r\n\n                                    => no key came in
    # a comment\n                               => no key came in
    -----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n => this is a private key
    -----BEGIN RSA PRIVATE KEY-----\n           => this is a private key
    ---- BEGIN SSH2 PUBLIC KEY ----\n           => is no public key
    garbage and more                            => is no public key
    ssh-ed25519                                 => is no public key
    {ED}                                        => is no public key
    {LINE}\ngarbage                             => "garbage" is no public key
    command="/bin/sh" {LINE}                    => is no public key
    no-pty {LINE}                               => is no public key
    ssh-ed25519 x{ED} a                         => is no public key
    ssh-ed25519 {ED}"x a                        => is no public key
    ssh-ed25519 {ED}==== a                      => is no public key
    SSH-ED25519 {ED}                            => is no public key
    \e[2J \0                                    => "?[2J ?" is no public key
    '''.rstrip().replace('{ED}', ED).replace('{LINE}', LINE),
    ('x' * 10 ** 6, 'xxx..." is no'), (dh.to_text(b'\xff\xfe\x00 \x80'), 'is no public'))
def test_what_is_no_list_of_public_keys_is_refused_whole(text, said):
    assert said in refusal(dh.parse_public_keys, text)

@pytest.mark.skipif(dh.execute(['which', 'ssh-keygen']).status, reason='no ssh-keygen')
def test_openssh_decides_what_a_key_is_and_prints_its_fingerprint():
    host = Host('/')
    assert dh.fingerprint(host, *ONE) in (
        'SHA256:IcBTyoCUO8IOhUcfcAcw9+qYYPF/HUxWZTfrHYzhWn4',
        '2b:04:f2:76:5b:33:04:a0:9a:1d:b4:e3:ed:a6:8d:c0')      # before 6.8
    for kind, blob in (('ssh-rsa', ED), ('garbage', ED), ('ssh-ed25519', ED[:-2]),
                       ('ssh-ed25519', ED + '='), ('ssh-ed25519', ED + 'AAAA')):
        assert dh.fingerprint(host, kind, blob) == ''

OPTIONS = 'no-port-forwarding,no-X11-forwarding,no-agent-forwarding,no-user-rc'
OLDER = 'no-port-forwarding,no-X11-forwarding,no-agent-forwarding,no-pty,no-user-rc'
KEYS_TEXT = '''ssh-rsa AAAA admin's own
# dockhand: keys from here to the next mark; see `dockhand keys`
command="/usr/local/bin/dockhand serve anna",%s ssh-ed25519 %s anna
command="/usr/local/bin/dockhand serve bob blog wiki",%s ssh-ed25519 %s bob
# dockhand: end of keys
ssh-rsa BBBB another
''' % (OPTIONS, ED, OPTIONS, ED_2)
KEYS = [Key(*ONE + ('anna', ())), Key(*TWO + ('bob', ('blog', 'wiki')))]

def test_authorized_keys_are_written_between_two_marks_and_read_again():
    lines = dh.read_authorized_keys(KEYS_TEXT)
    assert dh.keys_in(lines) == KEYS
    assert dh.render_authorized_keys(lines) == KEYS_TEXT
    own = "ssh-rsa AAAA admin's own\n"
    assert own + keys_text(*KEYS) + 'ssh-rsa BBBB another\n' == KEYS_TEXT

@pytest.mark.parametrize('text', [
    'ssh-rsa AAAA me\n\n# x\n', dh.to_text(b'# a\xe2\x80\xa8b\n'), '# a\x0cb\r\n', ''])
def test_lines_of_others_are_left_alone_wherever_they_stand(text):
    for whole in (text, KEYS_TEXT + text, KEYS_TEXT.replace('command=', text + 'command=')):
        lines = dh.read_authorized_keys(whole)
        assert dh.render_authorized_keys(lines) == whole
        added = dh.render_authorized_keys(dh.add_keys(lines, [THREE], 'carl', ()))
        assert added.replace(keys_text(Key(*THREE + ('carl', ()))), '') == whole or (
            added.replace(dh.make_key_line(Key(*THREE + ('carl', ()))).text + '\n', '')
            == whole)
    assert dh.render_authorized_keys(dh.read_authorized_keys(text + 'x')) == text + 'x\n'

SERVES_BOB = 'command="/usr/local/bin/dockhand serve bob",no-pty ssh-rsa BBBB x'

@pytest.mark.parametrize('line', [
    SERVES_BOB, '\t ' + SERVES_BOB, 'no-pty,' + SERVES_BOB,
    'from="192.0.2.1",' + SERVES_BOB, r'environment="A=\"x, y",' + SERVES_BOB,
    'environment="A=,command=",' + SERVES_BOB,
    'from="10.0.0.1, 10.0.0.2",COMMAND="exec /usr/local/bin/gitreceive serve bob" '
    'ssh-rsa BBBB'])
def test_a_line_that_reaches_serve_is_ours_wherever_it_stands(line):
    for text in (line + '\n' + KEYS_TEXT, KEYS_TEXT + line + '\n',
                 KEYS_TEXT.replace('command=', 'ssh-rsa CCCC x\n%s\ncommand=' % line, 1)):
        lines = dh.read_authorized_keys(text)
        assert Key('ssh-rsa', 'BBBB', 'bob', ()) in dh.keys_in(lines)
        left = dh.render_authorized_keys(dh.remove_keys(lines, 'bob'))
        assert 'serve bob' not in left and 'serve anna' in left

@pytest.mark.parametrize('line', [
    '# ' + SERVES_BOB, ' #from="192.0.2.1",' + SERVES_BOB, 'ssh-rsa BBBB command="/usr/local/bin/dockhand serve bob"',
    'environment="command=/usr/local/bin/dockhand serve bob" ssh-rsa BBBB x',
    'command="/usr/bin/other serve bob" ssh-rsa BBBB x',
    'command="/usr/local/bin/dockhand serve" ssh-rsa BBBB x',
    'command="/usr/local/bin/dockhand serve bob ssh-rsa BBBB x'])
def test_a_line_that_does_not_reach_serve_is_not_ours(line):
    assert dh.keys_in(dh.read_authorized_keys(line)) == []

def test_other_options_of_a_line_stay_when_its_rights_change():
    lines = dh.read_authorized_keys('from="192.0.2.1",' + SERVES_BOB)
    assert dh.render_authorized_keys(dh.add_keys(lines, [], 'bob', ('blog', 'wiki'))) == (
        'from="192.0.2.1",%s\n' % SERVES_BOB.replace(
            'serve bob', 'serve bob blog wiki'))

def test_a_command_around_ours_stays_when_the_rights_change():
    line = 'command="/usr/bin/nice -n5 /usr/local/bin/dockhand serve bob blog" ssh-rsa B x'
    lines = dh.add_keys(dh.read_authorized_keys(line), [], 'bob', ('wiki',))
    assert dh.render_authorized_keys(lines) == line.replace('bob blog', 'bob wiki') + '\n'

@pytest.mark.parametrize('before, words, after', [
    (OLDER, (), OPTIONS), (OLDER, ('blog', '--read-only'), OPTIONS + ',no-pty'),
    (OPTIONS, ('--read-only',), OPTIONS + ',no-pty'),
    (OPTIONS + ',no-pty', ('blog',), OPTIONS), (OPTIONS, ('--admin',), OPTIONS),
    ('no-pty', (), 'no-pty'), ('from="a",' + OLDER, (), 'from="a",' + OLDER)])
def test_who_may_run_may_have_a_terminal(before, words, after):
    line = 'command="/usr/local/bin/dockhand serve bob%s",%s ssh-rsa BBBB x'
    lines = dh.read_authorized_keys(line % (' wiki', before))
    changed = dh.render_authorized_keys(dh.add_keys(lines, [], 'bob', words))
    assert changed == line % (''.join(' ' + word for word in words), after) + '\n'
    again = [dh.renewed(each) for each in dh.read_authorized_keys(changed)]
    assert dh.render_authorized_keys(again) == changed

D = '/usr/local/bin/dockhand'

@pytest.mark.parametrize('forced, name, apps, changed', [
    (D + ' serve ci', 'ci', (), D + ' serve ci x y'),
    (D + ' serve ci a b', 'ci', ('a', 'b'), D + ' serve ci x y'),
    ("sh -c 'dockhand serve ci a'", 'ci', ('a',), "sh -c 'dockhand serve ci x y'"),
    (r'exec \"%s\" serve \"ci\" a' % D, 'ci', ('a',),
     r'exec \"%s\" serve \"ci\" x y' % D),
    ('cd /tmp;dockhand serve ci', 'ci', (), 'cd /tmp;dockhand serve ci x y'),
    ('python3 /usr/local/lib/dockhand/dockhand.py serve ci', 'ci', (),
     'python3 /usr/local/lib/dockhand/dockhand.py serve ci x y'),
    (D + ' serve ci a && logger  x', 'ci', ('a',), D + ' serve ci x y && logger  x'),
    (D + ' serve ci; logger x', 'ci', (), D + ' serve ci x y; logger x'),
    ('mydockhand serve ci', None, None, None), (D + ' server ci', None, None, None)])
def test_a_forced_command_is_read_and_changed_whatever_stands_around(
        forced, name, apps, changed):
    line = 'command="%s",no-pty ssh-rsa B x' % forced
    keys = dh.keys_in(dh.read_authorized_keys(line))
    assert keys == ([Key('ssh-rsa', 'B', name, apps)] if name else [])
    if changed:
        lines = dh.add_keys(dh.read_authorized_keys(line), [], name, ('x', 'y'))
        assert dh.render_authorized_keys(lines) == line.replace(forced, changed) + '\n'

def test_a_key_that_logs_in_by_another_line_is_told():
    text = '# ssh-rsa BBBB\nssh-rsa BBBB mine\n%s\n' % SERVES_BOB
    lines = dh.read_authorized_keys(text)
    assert dh.lines_that_log_in(lines, dh.keys_in(lines)) == [2]

def added(*args):
    return dh.keys_in(dh.add_keys(*args))

def lines_of(keys):
    return dh.read_authorized_keys(keys_text(*keys))

def test_a_key_is_added_once():
    once = added([], [ONE, ONE, TWO], 'anna', ())
    assert once == [Key(*ONE + ('anna', ())), Key(*TWO + ('anna', ()))]
    assert added(lines_of(once), [TWO], 'anna', ()) == once

def test_a_key_that_has_another_name_is_refused_with_that_name():
    assert 'known as "anna": dockhand remove-key anna' in refusal(
        dh.add_keys, lines_of(KEYS), [ONE], 'carl', ())

def test_new_rights_are_those_of_every_key_of_the_name():
    keys = added(lines_of(KEYS), [THREE], 'bob', ('blog',))
    assert [(key.name, key.words) for key in keys] == [
        ('anna', ()), ('bob', ('blog',)), ('bob', ('blog',))]

def test_rights_longer_than_sshd_reads_are_refused():
    assert 'too many apps' in refusal(
        dh.add_keys, [], [('ssh-rsa', RSA)], 'anna', ('a' * 40,) * 200)
    lines = [dh.make_key_line(Key('ssh-rsa', RSA, 'anna', ()))]
    assert 'too many apps' in refusal(dh.add_keys, lines, [], 'anna', ('a' * 40,) * 200)

def test_a_file_copied_from_the_server_gets_no_second_header():
    text = dh.headed('blog', 'job', 'exec x\n')
    assert re.match("# dockhand: blog's job, .*\nexec x\n\\Z", text)
    assert dh.headed('blog', 'job', text) == text

# ---- Config, and what an image says of its app -----------------------------------------

# What dockhand knows of an app besides its repository.

@table('key, value', r"""
    A               =>
    A               => it's "quoted" = #1, $HOME \\ and \t so_on
    DATABASE_URL    => postgres://u:p%20w@db:5432/x?a=b#c
    port            => 8000
    port            => 65535
    domains         => _
    domains         => blog.org *.blog.org _ .x.org
    branch          => feature/x-1.0
    overlap         => no
    timeout         => 600
    release         => ./manage.py migrate --set 'a b' "c \\" d"
    release         => sh -c 'echo "it"'\\''s'
    trust           => 192.0.2.7
    trust           => 10.0.0.0/8 192.168.0.0/16 2001:db8::/32 ::1 0.0.0.0/0 ::/0
    trust           => ::ffff:10.0.0.0/104 10.0.0.1/32""")
def test_a_setting_may_have_any_value_on_one_line(key, value):
    dh.check_setting(key, value)

@table('key, value, said', r"""
              => 1      => "" is no name for a variable: letters, digits and "_"
    1A        => 1      => "1A" is no name
    A\_B      => 1      => "A B" is no name
    A\n       => 1      => "A?" is no name
    A         => a\0b   => A: a variable is text in UTF-8, up to 32 KB: write it as base64
    PATH      => a\nb   => PATH: docker itself would go by it: a value of several lines
    HOME      => a\rb   => HOME: docker itself would go by it
    LD_AUDIT  => a\nb   => LD_AUDIT: docker itself would go by it
    DOCKER_HOST => a\nb => DOCKER_HOST: docker itself would go by it
    https_proxy => a\nb => https_proxy: docker itself would go by it
    SSL_CERT_FILE => a\nb => SSL_CERT_FILE: docker itself would go by it
    release   => a\nb   => release=a?b: a command is wanted
    port      => 0      => port=0: a number from 1 to 65535 is wanted
    port      => 80/udp => port=80/udp: a number from 1 to 65535 is wanted
    port      => 65536  => port=65536: a number
    port      => 99999  => port=99999: a number
    port      => 080    => port=080: a number
    port      =>        => port=: a number
    domains   => A.org  => domains=A.org: host names in lower case are wanted, with one
    domains   => a;b    => domains=a;b: host names
    domains   => a\_\_b => domains=a  b: host names
    domains   => a\_    => domains=a : host names
    domains   =>        => domains=: host names
    branch    => -x     => branch=-x: the name of a branch is wanted, as main or live/x,
    branch    => a..b   => branch=a..b: the name of a branch
    branch    => a//b   => branch=a//b: the name of a branch
    branch    => a/     => branch=a/: the name of a branch
    branch    => a/.b   => branch=a/.b: the name of a branch
    branch    => a.lock => branch=a.lock: the name of a branch
    branch    => a.lock/b => branch=a.lock/b: the name of a branch
    branch    => plan   => branch=plan: the name of a branch is wanted, as main or live/x
    overlap   => maybe  => overlap=maybe: yes or no is wanted
    timeout   => 1.5    => timeout=1.5: a number of seconds from 3 to 9999 is wanted
    timeout   => abc    => timeout=abc: a number of seconds from 3 to 9999 is wanted
    timeout   => 2      => timeout=2: a number
    timeout   => 10000  => timeout=10000: a number
    release   => echo 'x => release=echo 'x: a command is wanted, its quotes closed
    release   => echo " => release=echo ": a command is wanted, its quotes closed
    release   => echo \\ => release=echo \\: a command
    release   => \_     => release= : a command
    release   =>        => release=: a command
    trust     =>  => addresses are wanted, as 192.0.2.7, and networks
    trust     => \_ => addresses are wanted, as 192.0.2.7, and networks
    trust     => lb.org => addresses are wanted, as 192.0.2.7, and networks
    trust     => 10.0.1 => addresses are wanted, as 192.0.2.7, and networks
    trust     => 10.0.0.0/8, => addresses are wanted, as 192.0.2.7, and networks
    trust     => 10.0.0.0/33 => addresses are wanted, as 192.0.2.7, and networks
    trust     => 10.0.0.0/ => addresses are wanted, as 192.0.2.7, and networks
    trust     => 10.0.0.0/08 => addresses are wanted, as 192.0.2.7, and networks
    trust     => ::/129 => addresses are wanted, as 192.0.2.7, and networks
    trust     => 10.0.0.1/8 => addresses are wanted, as 192.0.2.7, and networks
    trust     => 2001:db8::1/32 => addresses are wanted, as 192.0.2.7, and networks
    trust     => 10.0.0.1; => addresses are wanted, as 192.0.2.7, and networks
    trust     => fe80::1%eth0 => addresses are wanted, as 192.0.2.7, and networks
    trust     => 10.0.0.0/8 * => addresses are wanted, as 192.0.2.7, and networks""")
def test_a_setting_that_nothing_can_hold_is_refused(key, value, said):
    assert said in refusal(dh.check_setting, key, value)

@pytest.mark.parametrize('data, times, said', [
    (b'x', 32769, 'up to 32 KB'), (b'\xc3\xa9', 16385, 'up to 32 KB'),
    (b'caf\xe9', 1, 'text in UTF-8')])
def test_a_value_that_no_environment_can_hold_is_refused(data, times, said):
    assert said in refusal(dh.check_setting, 'A', dh.to_text(data * times))
    dh.check_setting('A', dh.to_text(b'\xc3\xa9' * 16384))

def test_an_environment_is_written_as_docker_reads_it():
    config = {'B': 'it\'s "a" = #1, $X \\ ', 'A': dh.to_text(b'\xe2\x98\x83'), 'C': '',
              'port': '8000', 'domains': 'a b', 'release': 'x', 'branch': 'b',
              'overlap': 'no', 'timeout': '5', 'a.b': '1', '--env port': '2'}
    assert dh.environment_text(release(config=config)) == dh.to_text(
        b'A=\xe2\x98\x83\nB=it\'s "a" = #1, $X \\ \nC=\nGIT_REV=%s\nPORT=8000\n'
        b'a.b=1\nport=2\n' % dh.to_bytes(SHA))
    own = release(config=dict(config, PORT='9', GIT_REV='v1'))
    assert 'GIT_REV=v1\nPORT=9\na' in dh.environment_text(own)
    assert 'PORT' not in dh.environment_text(release(web=False, config=config))
    assert dh.environment_text(release(web=False)) == 'GIT_REV=%s\n' % SHA

def test_what_has_several_lines_is_handed_to_docker_by_name_alone():
    config = {'KEY': 'a\nb', 'CR': 'a\rb', 'A': '1', '--env pem': 'c\n'}
    app = release(config=config, volumes=[])
    assert dh.environment_text(app) == 'A=1\nGIT_REV=%s\nPORT=8000\n' % SHA
    process, = dh.processes_of(app)
    container = dh.plain_container(app, process, '/env')
    assert container.env == {'KEY': 'a\nb', 'CR': 'a\rb', 'pem': 'c\n'}
    assert container.options[3:7] == [
        '--env-file=/env', '--env=CR', '--env=KEY', '--env=pem']
    assert 'a\nb' not in repr(container.options)

@pytest.mark.parametrize('words, unset, wanted', [
    (['A=1'], False, {'A': '1', 'port': '80'}),
    (['A=a=b=#c d'], False, {'A': 'a=b=#c d', 'port': '80'}),
    (['port=8000', 'B='], False, {'A': 'old', 'port': '8000', 'B': ''}),
    (['A=1', 'A=2', 'port'], True, {'A': '2'}), (['A', 'port'], True, {}),
    ([], False, {'A': 'old', 'port': '80'})])
def test_a_config_is_changed_word_by_word(words, unset, wanted):
    found = {'A': 'old', 'port': '80'}
    assert dh.change_config(found, words, unset) == wanted
    assert found == {'A': 'old', 'port': '80'}

@pytest.mark.parametrize('words, unset, said', [
    (['A'], False, '"A" is not KEY=VALUE'),
    (['A=1', 'port=x'], False, 'port=x: a number'), (['=1'], False, '"" is no name'),
    (['A=1', 'domain=x'], False, 'no setting is called "domain"'),
    (['B'], True, 'no B is set'), ([], True, '--unset wants KEY'),
    (['A=1'], True, '--unset wants KEY'),
    (['A=1', 'B'], True, 'no B is set')])
def test_a_change_of_config_is_refused_as_a_whole(words, unset, said):
    found = {'A': 'old'}
    assert said in refusal(dh.change_config, found, words, unset)
    assert found == {'A': 'old'}

@table('key, said', """
    domain   => "domain": did you mean "domains"? variables are in upper case
    domians  => "domians": did you mean "domains"?
    ports    => "ports": did you mean "port"? variables are in upper case
    overlaps => "overlaps": did you mean "overlap"?
    timout   => "timout": did you mean "timeout"?
    realease => "realease": did you mean "release"?
    memory   => "memory": did you mean options="--memory 512m"? variables are in upper
    volume   => "volume": did you mean options="--memory 512m"?
    cpu      => "cpu": did you mean options=
    dockerfile => "dockerfile": did you mean build="--target prod"?
    subdir   => "subdir": did you mean folder=services/api?
    healthcheck => "healthcheck": did you mean check=/up?
    replica  => "replica": did you mean scale="web=2"?
    command  => "command": commit a Procfile; variables
    ssl      => "ssl": it is a command: dockhand https; variables
    x        => "x": they are branch,""")
def test_a_word_in_lower_case_that_is_no_setting_is_refused_with_the_nearest(key, said):
    assert ('no setting is called ' + said) in refusal(
        dh.change_config, {}, [key + '=1'], False)

@each('key', 'http_proxy spring.profiles.active Path A a1 x-y _x DOMAIN Domain pORT')
def test_any_other_name_is_that_of_a_variable(key):
    assert dh.change_config({}, [key + '=1'], False) == {key: '1'}

def test_a_variable_that_an_app_has_may_be_changed_and_taken_away_whatever_its_name():
    found = dh.read_config({'memory': '1g', 'check': 'x', 'settings': 'a'})
    assert dh.change_config(found, ['memory=2g']) == dict(found, **{'--env memory': '2g'})
    assert dh.change_config(found, ['check=/up']) == dict(found, check='/up')
    assert dh.change_config(found, ['check=y'], env=True) == dict(
        found, **{'--env check': 'y'})
    both = dict(found, check='/up')
    for env in (False, True):
        once = dh.change_config(both, ['check'], unset=True, env=env)
        assert once == dict((key, both[key]) for key in both
                            if key != ('--env check' if env else 'check'))
    assert dh.change_config(
        both, ['memory', 'check', 'settings', 'check'], unset=True) == {}

@pytest.mark.parametrize('record', [
    {}, {'A': '1', 'domains': 'a', 'check': 'old', 'x': ''}, {'settings': 's'},
    {'settings': {'check': '/up'}, 'variables': {'check': 'v', 'settings': 'w'}}])
def test_a_setting_stays_one_and_a_variable_too_however_they_are_called(record):
    config = dh.read_config(record)
    assert dh.read_config(dh.config_record(config)) == config
    variables = record.get('variables') or dict(
        (key, record[key]) for key in record if key != 'domains')
    assert dh.variables_of(config) == variables
    assert config.get('check') == (
        '/up' if isinstance(record.get('settings'), dict) else None)

@each('name', 'GOOGLE_CREDENTIALS GOAL HOMEPAGE PATHS DOCKERFILE ENVIRONMENT')
def test_what_only_looks_like_dockers_own_may_have_several_lines(name):
    dh.check_variable(name, 'a\nb')

def docker_stopping(machine, *names):
    """docker was told to stop these, and the program takes its time: a start does nothing,
    and once a later stop has come back it is over."""
    start, stopping = machine.docker_start, set(names)

    def docker_start(_, name):
        return None if name in stopping else start(_, name)

    def docker_stop(*words):
        stopping.difference_update(words)
        return type(machine).docker_stop(machine, *words)
    machine.docker_start, machine.docker_stop = docker_start, docker_stop
    for name in names:
        machine.containers[name]['policy'] = 'no'
    return lambda: [machine.containers[name]['State'].update(Running=False)
                    for name in stopping]

@pytest.mark.parametrize('act', [
    lambda plain: dh.cmd_recover(plain.host), lambda plain: dh.cmd_start(plain.app)])
@pytest.mark.parametrize('pending', [False, True])
def test_what_was_being_stopped_by_a_killed_dockhand_runs_again(plain, act, pending):
    if pending:
        half_deployed(plain, 1, (ONE_TYPES, TWO_TYPES))
    else:
        plain.lives(ONE_TYPES)
    over = docker_stopping(plain, 'blog--1--worker')
    act(plain)
    over()
    assert plain.running() == ['sha256:FROMone', 'sha256:FROMone']
    assert [plain.containers[name]['policy'] for name in ('blog--1', 'blog--1--worker')] == [
        'always', 'always']
    assert plain.app.linked('pending') is None

def test_one_container_that_is_gone_hides_nothing_of_another(plain):
    plain.lives(ONE_TYPES)
    plain.broken['docker stop'] = 99
    del plain.containers['blog--1--worker']
    assert 'broken on purpose' in refusal(
        plain.host.docker.on_containers, ['blog--1--worker', 'blog--1'], 'stop', '-t', '1')

def test_a_file_of_variables_is_read_as_docker_reads_it():
    piped = '# all\n\n  A=1 # no comment\r\nB="q"\nmemory=2\nport=x\nC=\nA=3'
    assert dh.change_config({'Z': '9'}, ['-', 'Y=8'], piped=piped) == {
        'Z': '9', 'A': '3', 'B': '"q"', '--env memory': '2', '--env port': 'x',
        'C': '', 'Y': '8'}

@pytest.mark.parametrize('data, said', [
    (b'A=1\nB\n', 'line 2 of it, `B`, is not NAME=VALUE'),
    (b'A B=1', 'line 1 of it: "A B" is no name for a variable'),
    (b'\n\n=1', 'line 3 of it: "" is no name'),
    (b'A=\xff', 'line 1 of it: A: a variable is text in UTF-8')])
def test_a_file_of_variables_is_refused_by_line_and_as_a_whole(data, said):
    with standard_input(data):
        assert said in refusal(
            lambda: dh.change_config({}, ['-'], piped=dh.read_stdin()))

@pytest.mark.parametrize('data, value', [
    (b'secret\n', 'secret'), (b'secret\r\n', 'secret'), (b'secret', 'secret'),
    (b'a#"\' ', 'a#"\' '), (b'-\n', '-'), (b'', ''), (b'a\nb\n\n', 'a\nb\n'),
    (b'\xc3\xa9\n', dh.to_text(b'\xc3\xa9'))])
def test_a_secret_is_read_from_standard_input_without_its_line_end(data, value):
    with standard_input(data):
        assert dh.change_config({}, ['A=-'], piped=dh.read_stdin()) == {'A': value}

@pytest.mark.parametrize('data, times, said', [
    (b'\xff\n', 1, 'text in UTF-8'),
    (b'x', 40000, 'up to 32 KB'), (b'x', 300000, 'larger than')])
def test_a_secret_that_will_not_do_is_refused(data, times, said):
    with standard_input(data * times):
        assert said in refusal(
            lambda: dh.change_config({}, ['A=-'], piped=dh.read_stdin()))

@table('exposed, port, more, found, web', """
                        =>      =>     => 0    => False
                        => 9000 =>     => 9000 => True
                        => none =>     => 0    => False
    8000/tcp            => none => yes => 0    => False
                        =>      => web => 5000 => True
    9000/tcp            =>      => web => 9000 => True
                        => 81   => web => 81   => True
                        => none => web => 0    => False
    8000/tcp            => 81   => worker => 0 => False
    8000/tcp            =>      => hidden => 8000 => False
                        =>      => yes => 0    => False
    8000/tcp            =>      =>     => 8000 => True
    3000/tcp 8080/tcp 443/tcp  =>      =>     => 8080 => True
    5000/tcp 80/tcp     =>      =>     => 80   => True
    80/tcp              => 81   =>     => 81   => True
    5432/tcp            =>      =>     => 5432 => False
    25/tcp 143/tcp 25/udp  =>   =>     => 25   => False
    5432/tcp            => 5432 =>     => 5432 => True
    9000/tcp            =>      => yes => 9000 => True
    9000/tcp 3000/tcp   =>      => yes => 3000 => True
    443/tcp             =>      =>     => 443  => False
    53/udp              =>      =>     => 0    => False
    80/udp              =>      =>     => 0    => False
    80/sctp             =>      =>     => 0    => False""")
def test_what_an_image_exposes_says_what_an_app_is(exposed, port, more, found, web):
    settings = {'ExposedPorts': dict((each, {}) for each in exposed.split()) or None}
    config = {'port': port} if port else {}
    if more == 'hidden':
        config['domains'] = 'none'
    app = release(config=config, proxy='x' if more == 'yes' else '',
                  procfile='%s: ./run\n' % more if more.startswith('w') else '')
    assert [str(each) for each in dh.read_image(settings, app)] == [found, web, '[]']
    env = dh.environment_text(app._replace(port=int(found), web=web == 'True'))
    assert ('PORT=%s\n' % found in env) == (found != '0' and (
        web == 'True' or more == 'hidden'))

def test_an_image_of_any_docker_is_read():
    assert dh.read_image({}, release()) == (0, False, [])
    volumes = {'/var/lib/b': {}, '/a b': {}}
    assert dh.read_image({'Volumes': volumes}, release())[2] == ['/a b', '/var/lib/b']

# ---- Processes -------------------------------------------------------------------------

def test_a_procfile_is_read_line_by_line():
    assert dh.parse_procfile(
        '# what runs\n\nworker: ./work --all  \r\n  web:serve -p $PORT\n'
        'release: ./migrate; true\nfetch-mail2: a: b\n') == [
            ('worker', './work --all'), ('web', 'serve -p $PORT'),
            ('release', './migrate; true'), ('fetch-mail2', 'a: b')]

@table('text, said', r"""
    web                => Procfile:1: `web` is no `TYPE: COMMAND`, the type in lower case
    web:               => Procfile:1: `web:` is no `TYPE: COMMAND`
    : a                => Procfile:1: `: a` is no `TYPE: COMMAND`
    \n\nWeb: a         => Procfile:3: `Web: a` is no `TYPE: COMMAND`
    a--b: c            => Procfile:1: `a--b: c` is no
    a_b: c             => Procfile:1: `a_b: c` is no
    1a: c              => Procfile:1: `1a: c` is no
    a b: c             => Procfile:1: `a b: c` is no
    web: a\nweb: b     => Procfile:2: web is there already
    run: a             => Procfile:1: no process can be called run: another name is wanted
    a: b\ncron: c      => Procfile:2: no process can be called cron: what runs at its time
    cron-1a2b3c4d: c   => Procfile:1: no process can be called cron-1a2b3c4d: what runs at
    run-7: c           => Procfile:1: no process can be called run-7: another name is
    # nothing          => Procfile: it names no process""")
def test_a_line_that_is_no_process_is_refused_by_file_and_line(text, said):
    assert refusal(dh.parse_procfile, text).startswith(said)

@table('command, words', r"""
    ./work --all            => ./work|--all
    serve -p 5000 a:b       => serve|-p|5000|a:b
    serve -p $PORT          => sh|-c|exec serve -p $PORT
    work 'a b' > /dev/null  => sh|-c|exec work 'a b' > /dev/null
    A=1 ./work              => sh|-c|A=1 ./work
    cd /srv; ./work $A      => sh|-c|cd /srv; ./work $A
    a && b                  => sh|-c|a && b
    (a)                     => sh|-c|(a)
    exec a "$B"             => sh|-c|exec a "$B"
    exec serve -p 80        => serve|-p|80
    exec                    => sh|-c|exec
    cd /                    => sh|-c|cd /
    . /env                  => sh|-c|. /env
    sleep 9 # for a while   => sh|-c|exec sleep 9 # for a while
    while true              => sh|-c|while true""")
def test_a_command_is_run_by_a_shell_where_that_knows_a_letter_of_it(command, words):
    assert dh.command_words(command) == words.split('|')

def names_of(app):
    return ['%s %s' % (process.name, process.address or '-')
            for process in dh.processes_of(app)]

def test_each_process_is_a_container_and_each_web_has_an_address():
    app = release(procfile='mail-in: a\nweb: b\nrelease: c\n', number=7,
                  config={'scale': 'web=2 mail-in=3'}, addresses=['10.86.0.2', '10.86.0.9'])
    assert names_of(app) == [
        'blog--7 10.86.0.2', 'blog--7--2 10.86.0.9', 'blog--7--mail-in -',
        'blog--7--mail-in--2 -', 'blog--7--mail-in--3 -']
    assert dh.count_addresses(app) == 2
    assert [dh.title_of(each) for each in dh.processes_of(app)] == [
        'web', 'web.2', 'mail-in', 'mail-in.2', 'mail-in.3']
    assert dh.front_of(app).part == ('blog--7', 'blog--7--2')
    assert names_of(dh.workers_of(app)) == [
        'blog--7--mail-in -', 'blog--7--mail-in--2 -', 'blog--7--mail-in--3 -']

@table('procfile, scale, names', """
                       =>          => blog--3 10.86.0.2
    release: migrate   =>          => blog--3 10.86.0.2
    a: x               =>          => blog--3--a -
    a: x               => a=0      =>
                       => web=1    => blog--3 10.86.0.2""")
def test_an_app_has_one_process_unless_its_procfile_says_what_runs(procfile, scale, names):
    app = release(procfile=procfile, config={'scale': scale} if scale else {})
    assert ', '.join(names_of(app)) == names
    assert dh.count_addresses(app) == 1

def test_only_web_has_the_name_of_the_app_and_its_ports():
    app = release(procfile='web: serve $PORT\nworker: work\n', volumes=['/data', '/tmp/x'],
                  config={'options': '-p 25:25 -v /srv/x:/tmp/x/ --memory 1g'})
    web, worker = dh.processes_of(app)
    assert dh.plain_container(app, web, '/env') == dh.Container(
        ['--net=dockhand', '--ip=10.86.0.2', '--net-alias=blog', '--env-file=/env',
         '--add-host=host.docker.internal:10.86.0.1', '--volume=blog--data:/data',
         '--publish=25:25', '--volume=/srv/x:/tmp/x/', '--memory=1g'],
        'blog', ['sh', '-c', 'exec serve $PORT'], {}, '/', True, '10')
    assert dh.plain_container(app, worker, '/env') == dh.Container(
        ['--net=dockhand', '--env-file=/env', '--add-host=host.docker.internal:10.86.0.1',
         '--volume=blog--data:/data', '--volume=/srv/x:/tmp/x/', '--memory=1g'],
        'blog', ['work'], {}, '/', True, '10')

@table('options, said', r"""
    --name x                 => options: leave out `--name`: dockhand names the containers
    --net=host               => options: leave out `--net=host`: the apps are on one
    --network host           => options: leave out `--network`: the apps are on one network
    --ip 10.0.0.1            => options: leave out `--ip`
    --ip6 ::1                => options: leave out `--ip6`
    --net-alias x            => options: leave out `--net-alias`
    --network-alias x        => options: leave out `--network-alias`
    --link a                 => options: leave out `--link`
    --restart always         => options: leave out `--restart`: docker starts them again
    --cidfile /x             => options: leave out `--cidfile`
    --volumes-from x         => options: leave out `--volumes-from`: mount what is wanted
    --pull always            => options: leave out `--pull`: the image is what was pushed
    -P                       => options: leave out `-P`: say which: -p PORT:PORT
    -d                       => options: leave out `-d`: a service runs by itself
    -itm 1g                  => options: leave out `-itm`: a service runs by itself
    --rm                     => options: leave out `--rm`
    --help                   => options: leave out `--help`
    --label dockhand.app=x   => options: leave out `dockhand.app=x`: dockhand's own labels
    -l dockhand=x            => options: leave out `dockhand=x`
    --label-file /x          => options: leave out `--label-file`
    --memory 1g image        => options: `image` is no option, which begins with a dash
    x                        => options: `x` is no option
    --                       => options: `--` is no option
    --memory 1g --           => options: `--` is no option
    --stop-timeout -1        => options: --stop-timeout wants a number of seconds
    --stop-timeout 1m        => options: --stop-timeout wants a number of seconds""")
def test_an_option_that_is_dockhands_is_refused_by_word(options, said):
    assert refusal(dh.read_options, options).startswith(said)

@pytest.mark.parametrize('options, mounts', [
    ('-v /srv/a:/a -v b:/b:ro -v /c --tmpfs /d', [('/srv/a', False), ('b', True)]),
    ('-v a:/a:z,ro -v/b:/b:rw', [('a', True), ('/b', False)]),
    ('--mount type=bind,source=/a,target=/b --mount src=c,dst=/d,readonly',
     [('/a', False), ('c', True)]),
    ('--mount type=tmpfs,dst=/x --mount src=c,dst=/d,ro=false', [('c', False)]),
    ('--mount \'"src=/a,b",dst=/b,readonly=true\'', [('/a,b', True)]),
    ('--mount type=volume,dst=/x,volume-opt=o=bind,volume-opt=device=/etc',
     [('/etc', False)]),
    ('-p 80:80 --memory 1g', [])])
def test_what_options_mount_is_known(options, mounts):
    assert dh.mounts_of(dh.read_options(options)) == [dh.Mount(*each) for each in mounts]

@table('text, said', r"""
    -t x                         => build: `-t` is not taken; these are: -f --add-host
    -o /root                     => build: `-o` is not taken
    --output /root               => build: `--output` is not taken
    --iidfile /etc/x             => build: `--iidfile` is not taken
    --metadata-file /etc/x       => build: `--metadata-file` is not taken
    --build-context a=/root      => build: `--build-context` is not taken
    --cache-to type=local,dest=/ => build: `--cache-to` is not taken
    --ssh default                => build: `--ssh` is not taken
    --allow security.insecure    => build: `--allow` is not taken
    --cgroup-parent x            => build: `--cgroup-parent` is not taken
    x                            => build: `x` is not taken
    --                           => build: `--` is not taken
    --target                     => build: `--target` wants a value
    -f                           => build: `-f` wants a value
    -f -                         => build: -f wants the path of a file of the repository
    -f /etc/passwd               => build: -f wants the path of a file
    -f ../x                      => build: -f wants the path of a file
    -f a/../../x                 => build: -f wants the path of a file
    --file=-                     => build: -f wants
    --secret id=a,src=/etc/shadow => build: `--secret id=a,src=/etc/shadow`: write --secret
    --secret id=a                => build: `--secret id=a`: write --secret id=NAME,env=VAR
    --secret id=a,env=A,src=/x   => write --secret id=NAME,env=VARIABLE
    --secret id=a,type=file,env=A => write --secret id=NAME,env=VARIABLE
    --secret env=A               => write --secret id=NAME,env=VARIABLE
    --secret id=a,env=PATH       => build: docker itself would go by `PATH`
    --build-arg HOME             => build: docker itself would go by `HOME`
    --build-arg LD_PRELOAD       => build: docker itself would go by `LD_PRELOAD`
    --build-arg=DOCKER_HOST      => build: docker itself would go by `DOCKER_HOST`
    --build-arg BUILDKIT_SYNTAX  => build: docker itself would go by `BUILDKIT_SYNTAX`
    --build-arg HTTPS_PROXY      => build: docker itself would go by `HTTPS_PROXY`
    --build-arg 1A               => "1A" is no name for a variable
    --label dockhand.app=x       => build: leave out `dockhand.app=x`
    --network container:shop--1  => build: --network wants default, none or host""")
def test_words_of_a_build_that_reach_out_of_it_are_refused(text, said):
    assert said in refusal(dh.read_build, text)

def test_the_words_of_a_build_are_docker_words_and_name_what_they_want():
    config = {'build': '--build-arg A=1 --build-arg TOKEN --target prod --no-cache --pull '
              '--secret id=npm,env=NPM -f docker/prod.Dockerfile --label a="b c" '
              '--network none --ulimit nofile=9 --shm-size 1g --add-host a:1.2.3.4 '
              '--platform linux/amd64', 'TOKEN': 't', 'NPM': 'n', 'OTHER': 'o'}
    words, env = dh.own_build(release(config=config), '/b')
    assert words == [
        '--build-arg=A=1', '--build-arg=TOKEN', '--target=prod', '--no-cache', '--pull',
        '--secret=id=npm,env=NPM', '--file=/b/docker/prod.Dockerfile', '--label=a=b c',
        '--network=none', '--ulimit=nofile=9', '--shm-size=1g', '--add-host=a:1.2.3.4',
        '--platform=linux/amd64']
    assert env == {'TOKEN': 't', 'NPM': 'n', 'DOCKER_BUILDKIT': '1'}
    assert dh.dockerfile_of(config) == 'docker/prod.Dockerfile'
    assert dh.own_build(release(), '/b') == ([], {})
    for other, alike in [({}, True), ({'OTHER': '2'}, True), ({'TOKEN': '2'}, False),
                         ({'folder': 'a'}, False), ({'build': '--pull'}, False)]:
        assert dh.is_built_alike(config, dict(config, **other)) is alike

@table('options, safe', """
    --memory 1g                     => True
    -v /srv/a:/a:ro --tmpfs /b      => True
    -p 25:25                        =>
    -p 127.0.0.1:25:25              =>
    -v /srv/a:/a                    =>
    --mount src=a,dst=/a            =>""")
def test_a_published_port_or_a_mount_that_is_written_wants_a_gap(options, safe):
    old, new = release(), release(config={'options': options})
    overlaps = dh.Containers(dh.App(Host(), 'blog')).overlaps
    assert overlaps(old, new) is overlaps(new, old) is bool(safe)
    allowed = new._replace(config=dict(new.config, overlap='yes'))
    assert overlaps(old, allowed)

# ---- Jobs ------------------------------------------------------------------------------

def parsed(text):
    """[(name, value)] of the stanzas that are read."""
    return [(stanza.name, stanza.value.strip()) for stanza in dh.parse_job(text)]

@pytest.mark.parametrize('end', ['\n', '\r\n', ''])
@table('name, value', r'''
    description => "a b"
    author => "me"
    version => 1.0
    usage => "x"
    instance => $N
    env => A
    env => A="b c"
    export => A B
    emits => a b
    manual =>
    start on => (filesystem and started docker) or runlevel [2345]
    stop on => started a INSTANCE!=b
    exec => sh -c "a; b" | c
    pre-start exec => true
    post-start exec => true
    pre-stop exec => true
    post-stop exec => true
    expect => fork
    task =>
    respawn =>
    respawn => limit 10 5
    normal exit => 0 TERM
    kill timeout => 20
    kill signal => SIGINT
    console => log
    umask => 022
    nice => -5
    oom => score -99
    limit => nofile 1024 unlimited
    chroot => /x
    chdir => /x
    setuid => www
    setgid => www
    debug =>
    reload signal => HUP
    apparmor => load x
    cgroup => memory x''')
def test_each_stanza_of_upstart_is_read(name, value, end):
    assert parsed((name + ' ' + value).strip() + end) == [(name, value.replace('"', ''))]

@each('kind', r'pre-start\_ post-start\_ pre-stop\_ post-stop\_', '')
@table('text, value', r'''
    {0}script\n  a\n  # end script?\n  b\nend script\n     => a\n  \n  b
    \_{0}script \r\n a\r\n end\tscript                     => a
    # x\n\n{0}script\necho end script\nend script\nexec a  => echo end script
    {0}script\nend script                                  =>
    {0}script # x\na\nend script # y\n{0}script\nb\nend script => a''')
def test_a_script_goes_to_its_end(text, value, kind):
    assert parsed(text.format(kind))[0] == (kind + 'script', value)

@table('text, values', r'''
    exec a \\\n  b\nrespawn                 => a \n  b|
    start on (a\n  and b)\nexec c           => (a\n  and b)|c
    start on (a and (b\n or c))\n           => (a and (b\n or c))
    start on (a\n and (b or (c\n)))\nexec d => (a\n and (b or (c\n)))|d
    start on a # (b\nexec c                 => a|c
    start on a X="(" Y='(' Z=\\(\nexec c   => a X=( Y=( Z=(|c
    start on (a # )\n or b)\nexec c         => (a \n or b)|c
    start on a \\\n or (b\n or c)\nexec d   => a \n or (b\n or c)|d
    stop on a)\nexec c                      => a)|c
    # exec a\n\t \n  exec b # it's\nrespawn => b|
    exec a\r\n\r\nexec b                    => a|b''')
def test_continued_lines_and_comments_are_read(text, values):
    assert '|'.join(value for _, value in parsed(text)) == values

@table('text, said', r'''
    nonsense\n               => 1: `nonsense`: an unknown stanza
    \nExec a\n               => 2: `Exec a`: an unknown stanza
    exec a\nexecute b        => 2: `execute b`: an unknown stanza
    respawn\npre-begin exec x => 2: `pre-begin exec x`: an unknown stanza
    kill\n                   => 1: `kill`: an unknown stanza
    kill hard x              => 1: `kill hard x`: an unknown stanza
    start with x\n           => 1: `start with x`: an unknown stanza
    \n\nscript\n a\n         => 3: `script`: an unknown stanza, or a script without
    script\n a\nend scripts  => 1: `script`: an unknown stanza, or
    pre-start script\n a     => 1: `pre-start script`: an unknown stanza, or
    script                   => 1: `script`: an unknown stanza, or a script without
    end script               => 1:
    \e[2J\n                  => 1: `?[2J`: an unknown stanza
    a\0b                     => 1: `a?b`: an unknown stanza
    exec docker run b "x\n   => 1: a quote is not closed
    respawn\nauthor don't    => 2: a quote is not closed
    task\nstart on (a\nexec b => 2: a parenthesis is not closed
    start on ((a)\n          => 1: a parenthesis is not closed''')
def test_a_job_that_init_would_not_read_is_refused_by_line(text, said):
    assert refusal(dh.parse_job, text).startswith('upstart.conf:' + said)

@table('begin, repeated, end', r'''
    => \_ =>
    => \_ => x
    => \_\n =>
    => x =>
    => ( =>
    => a\\\n =>
    => env A=1\n =>
    exec a => \_ => b
    exec\_ => a\_ =>
    exec\_ => a; =>
    exec\_ => a\\\n =>
    exec\_ => A=1\_ =>
    exec\_ => exec\_ =>
    exec\_ => 1 =>
    exec\_ => " =>
    exec\_ => '" =>
    exec " => \\" =>
    exec " => ${a => "
    exec\_ => ` =>
    exec\_ => $(a\_ =>
    exec a => > =>
    start on\_ => ( =>
    start on\_ => () =>
    start on ( => a\n =>
    => start on (a\n =>
    => start on (a\n)\n =>
    => script\n =>
    => script\nend script\n =>
    script\n => a\n =>
    script\n => a\n => \nend script
    script\nend script => \_ => x
    exec docker\_ => -H\_ =>
    exec docker run\_ => a\_ =>
    exec docker run\_ => -P\_ => b
    exec docker run - => P => \_b
    exec docker run\_ => -name a\_ => b
    script\n => docker run -p1 b\n => \nend script''')
def test_the_largest_file_is_read_in_one_pass(begin, repeated, end):
    """What takes the square of its length, or a call in a call for each letter, does
    not end here."""
    size = dh.FILE_LIMIT - len(begin + end)
    text = begin + (repeated * size)[:size] + end
    try:
        job = dh.parse_job(text)
        if dh.main_of(job):
            dh.check_job(job, 'blog')
            dh.container_of(job, 'blog')
    except Failure as failure:
        assert str(failure).startswith('upstart.conf:')
    else:
        dh.modernize_job(text)

def test_letters_without_end_are_options_of_their_own():
    job = dh.parse_job('exec docker run -%sp80 blog' % ('P' * 1500))
    assert [option.name for option in dh.options_of(job)] == (
        ['publish-all'] * 1500 + ['publish'])

def checked(text, proxied=(), volumes=()):
    return dh.check_job(dh.parse_job(text), 'blog', proxied, volumes)

@table('text, said', r'''
    => 1: no `exec` or `script`
    pre-start exec true                         => 1: no `exec` or `script`: say how
    exec\n                                      => 1: `exec`: a command is wanted
    exec docker run --rm                        => 1: `docker run` names no image
    \nexec docker run -d blog                   => 2: `-d`: a detached container
    exec docker run --detach blog               => 1: `--detach`: a detached
    exec docker run --detach=true blog          => 1: `--detach=true`
    exec docker run -d=true blog                => 1: `-d=true`
    exec docker run -i blog                     => 1: `-i`: a service has no terminal
    exec docker run \\\n --rm \\\n -t blog      => 3: `-t`: a service has no terminal
    exec docker run --rm -it blog               => 1: `-it`
    exec docker run --interactive --tty blog    => 1: `--interactive`
    exec /usr/bin/docker -H x run -itp 80:80 b  => 1: `-itp`
    exec docker container run -d blog           => 1: `-d`
    exec sudo docker -l debug run -d blog       => 1: `-d`
    exec "docker" run "-d" blog                 => 1: `"-d"`
    script\n  A=1 exec docker run -d b\nend script => 2: `-d`
    script\n :\n\n true && docker run -d b\nend script => 4: `-d`
    script\n if :; then docker run -d b; fi\nend script => 2: `-d`
    exec docker run --lxc-conf x blog           => 1: `--lxc-conf`
    exec docker run --name web blog             => 1: `--name`: without --rm the
    exec docker run -name=web blog              => 1: `-name=web`: without --rm
    exec docker run --rm=false --name web blog  => 1: `--name`: without --rm
    pre-start exec docker rm b2\nexec docker run --name web b   => 2: `--name`: without
    pre-start exec docker rm b2\nexec docker run --name rm b    => 2: `--name`: without
    description docker rm web\nexec docker run --name web b     => 2: `--name`: without
    exec docker run --rm --name w blog          => 1: `--name`: docker wants a name of two
    exec docker run --rm --name= blog           => 1: `--name=`: docker wants a name
    task\nkill signal 2\nexec docker run --rm b => 1: `task`
    respawn\nkill signal 2\nexec docker run b   => 2: `kill signal 2`: a number crashes
    kill signal 15\r\nexec docker run --rm b    => 1: `kill signal 15`
    kill signal "2"\nexec docker run --rm b     => 1: `kill signal
    kill timeout 5s\nexec docker run --rm b     => 1: `kill timeout 5s`: a number
    instance $N\nexec x                         => 1: `instance $N`
    exec docker run --rm b\nexpect fork         => 2: `expect fork`
    exec script \\\r\n -d\ntask                => 3: `task`
    script\r\n docker run b\r\nend script\r\n  => 2: `script`: sh takes Windows line ends
    exec docker run b\npre-start script\n\ta\r\nend script => 3: `pre-start script`: sh
    expect daemon\nexec x                       => 1: `expect daemon`''')
def test_what_kills_a_deploy_is_refused_by_line(text, said):
    assert refusal(checked, text).startswith('upstart.conf:' + said)

@table('text', r'''
    exec docker run --rm blog
    exec docker run --rm blog\r\n
    exec /opt/daemon --run -d
    exec docker run --rm=true --name web blog
    exec docker run -rm -name web blog
    exec docker run --name web --rm blog
    exec docker run --rm blog -d -i -t --name x
    exec docker run --rm blog sh -c "docker run -d x"
    exec docker run --rm -d=false -t=false --tty=false blog
    exec docker run --rm -e "A=-d -i" -v /d:/d -e -d 'blog' '-d'
    exec docker run --rm -h w -w /d -l t -u d -m 1g -c 2 -a stdout blog
    exec docker run --rm --sig-proxy=true --read-only --init blog -it
    exec docker run --rm -p 53:53/udp -p 25:25 -p 127.0.0.1:80:80 -p 0.0.0.0:80:80 blog
    exec docker run --rm blog:latest
    pre-start exec docker rm -f web\nexec docker run --name web blog
    post-stop exec docker rm web\nexec docker run --name web blog
    post-stop exec docker rm -f "$NAME"\nexec docker run --name web blog
    pre-start exec docker rm $(docker ps -aq -f name=web)\nexec docker run --name web blog
    pre-start script\n docker rm web || true\nend script\nexec docker run --name web blog
    script\n  docker rm -f web\n  exec docker run --name web blog\nend script
    pre-start exec docker run -d other\nexec docker run --rm blog
    # exec docker run -d x\nexec docker run --rm blog # -d
    exec docker run -d x\nscript\ndocker run --rm blog\nend script
    kill signal SIGINT\nkill timeout 30\nexpect none\nexec docker run --rm blog
    pre-stop exec docker stop -t 5 web\nexec docker run --rm --name web blog
    start on started docker\nstop on stopping docker\nexec docker run --rm blog''')
def test_what_runs_well_is_neither_refused_nor_doubted(text):
    assert checked(text) == []

OPEN = 'warning: `-p %s` is open to the world, past ufw; behind nginx: `-p %s`'
NOTE = ('note: under Upstart lost when docker restarts; `start on started docker`, '
        '`stop on stopping docker` is not')
GOES = ('warning: VOLUME %s is mounted nowhere, its data goes at every stop; to keep it: '
        '`-v %s`')
OTHER = 'warning: it runs the image `redis`, not what this repository builds, `blog`'

@pytest.mark.parametrize('text, volumes, doubts', [
    ('exec docker run -p 81:80 blog', '', [(1, OPEN % ('81:80', '127.0.0.1:81:80'))]),
    ('\nexec docker run \\\n -p80 blog', '', [(3, OPEN % ('80', '127.0.0.1:80:80'))]),
    ('exec docker run -p 7000:7 blog', '', [(1, OPEN % ('7000:7', '127.0.0.1:7000:7'))]),
    ('exec docker run --rm -p 7001:7 -p 80:80/udp blog', '', []),
    ('start on (filesystem and started docker)\nexec docker run blog', '', [(1, NOTE)]),
    ('exec docker run --rm redis', '/data', [(1, OTHER)]),
    ('exec docker run --rm -v /srv:/a blog', '/c /a /b', [
        (1, GOES % ('/b', '/srv/blog/b:/b')), (1, GOES % ('/c', '/srv/blog/c:/c'))]),
    ('exec docker run --rm -v /a -v x:/b:ro --volume=/s:/c/ blog', '/a /b /c/', []),
    ('exec docker run --rm --mount type=bind,target=/a --mount dst=/b blog', '/a /b', []),
    ('exec docker run --rm --tmpfs /a --tmpfs /b:size=1m blog', '/a /b', []),
    ('exec docker run --rm --volumes-from x blog', '/a', [])])
def test_what_is_doubtful_is_said_by_line(text, volumes, doubts):
    assert checked(text, ('7000',), volumes.split()) == doubts

@table('value, doubtful', '''
    80                => yes
    8000:80           => yes
    7000:7            => yes
    8000:80/tcp       => yes
    $PORT:80          => yes
    127.0.0.1:8000:80 =>
    127.0.0.1::80     =>
    53:53/udp         =>
    80:80/udp         =>
    7:7000            =>
    [::1]:80:80/tcp   =>''')
def test_a_published_port_is_read(value, doubtful):
    text = 'exec docker run --rm -p%s blog' % value
    assert dh.published_ports(dh.parse_job(text)) == [value]
    assert bool(checked(text, ('7000',))) == bool(doubtful)

OLD_JOB = '''# apache, as of 2014
pre-start exec docker run -rm busybox true
exec /usr/bin/docker run -rm -p 127.0.0.1:8000:80 -name=web \\
    -e "X=-rm" -link db:db -volumes-from data "-dns" 8.8.8.8 --rm \\
    -privileged=true -entrypoint /x -expose 80 -sig-proxy -cidfile /x blog -name -rm
'''
NEW_JOB = '''# apache, as of 2014
pre-start exec docker run -rm busybox true
exec /usr/bin/docker run --rm -p 127.0.0.1:8000:80 --name=web \\
    -e "X=-rm" --link db:db --volumes-from data -"-dns" 8.8.8.8 --rm \\
    --privileged=true --entrypoint /x --expose 80 --sig-proxy --cidfile /x blog -name -rm
'''

def test_old_options_before_the_image_get_their_second_dash():
    text, words = dh.modernize_job(OLD_JOB)
    assert text == NEW_JOB and dh.modernize_job(NEW_JOB) == (NEW_JOB, [])
    assert ' '.join(words) == (
        '-rm -name=web -link -volumes-from "-dns" -privileged=true -entrypoint -expose '
        '-sig-proxy -cidfile')

# ---- Containers described --------------------------------------------------------------

# What docker is told to run: of a job, and of a Dockerfile alone.

def contained(text):
    return dh.container_of(dh.parse_job(text), 'blog')

def test_a_job_becomes_a_container_with_its_own_arguments():
    assert contained('''
        env PORT=80
        env TEXT="a b"
        start on started docker
        chdir /srv
        respawn
        kill signal SIGINT  # apache
        kill timeout 20
        pre-start script
            docker rm -f web || true   # what is left
            docker pull busybox > /dev/null
        end script
        script
            exec docker run -d -i -t --rm --name web --restart=always --sig-proxy=false \\
                -p 127.0.0.1:8000:$PORT -v "/srv/a b:/data" --init -e "TEXT=$TEXT" \\
                -e 'RAW=$PORT' -m1g blog --port ${PORT} "x y" '$PORT' \\$PORT
        end script
        post-stop exec docker rm -f web''') == dh.Container(
            ['--publish=127.0.0.1:8000:80', '--volume=/srv/a b:/data', '--init',
             '--env=TEXT=a b', '--env=RAW=$PORT', '--memory=1g', '--stop-signal=SIGINT'],
            'blog', ['--port', '80', 'x y', '$PORT', '$PORT'],
            {'PORT': '80', 'TEXT': 'a b'}, '/srv', True, '20')

@table('text, at_boot', r'''
    =>
    start on started docker\n => yes
    manual\n                  =>
    start on x\nmanual\n      =>
    manual\nstart on x\n      => yes''')
def test_a_job_without_start_on_is_not_started_at_boot(text, at_boot):
    found = contained(text + 'exec docker run --rm blog')
    assert found == dh.Container([], 'blog', [], {}, '/', bool(at_boot), '5')

@table('text, options', r'''
    exec docker run --rm --privileged=true blog || true => --privileged=true
    exec docker run --rm --label a=b -lc=d blog         => --label=a=b --label=c=d
    exec docker run --rm -P -e X blog                   => --publish-all --env=X
    exec docker run --rm -P=true -- blog                => --publish-all=true
    env A=1 # x\nexec docker run --rm -e A=$A blog      => --env=A=1
    env A="it's"\nexec docker run --rm -e X="$A" blog   => --env=X=it's
    env B=1\nexec docker run --rm -e '$A'$B blog        => --env=$A1
    env A=1\nexec docker run -e X="it's$A's" blog       => --env=X=it's1's
    env A=1\nexec docker run -e "X=\\$A" blog           => --env=X=$A
    pre-start script\n docker rm x >/dev/null 2>&1 || true\nend script\nexec docker run blog =>
    post-stop exec docker rm x 2>/dev/null\nexec docker run -P blog => --publish-all
    env A=-P\nexec docker run --rm $A blog              => --publish-all''')
def test_a_job_is_read_as_the_shell_and_docker_would(text, options):
    assert contained(text).options == options.split() and contained(text).image == 'blog'

@table('text, said', r'''
    exec /opt/daemon                                        => 1: `exec` cannot be had
    exec sleep 9                                            => 1: `exec` cannot
    exec "docker run" blog                                  => 1: `exec` cannot
    exec >> /x docker run --rm blog                         => 1: `>> /x` cannot
    exec docker run > /x --rm blog                          => 1: `> /x` cannot
    chroot /x\nexec docker run --rm blog                    => 1: `chroot` cannot
    normal exit 0\nexec docker run --rm blog                => 1: `normal exit` cannot
    exec docker run --rm blog\npre-start exec mkdir /x      => 2: `mkdir` cannot
    post-stop script\n :\n rm x\nend script\nexec docker run b => 3: `rm` cannot
    pre-start exec echo x | docker rm y\nexec docker run b  => 1: `echo` cannot
    exec docker run --rm blog | logger                      => 1: `|` cannot
    exec docker run --rm blog & wait                        => 1: `&` cannot
    exec docker run --rm blog >> /var/log/x                 => 1: `>> /var/log/x` cannot
    exec docker run --rm blog 2>&1                          => 1: `2>&1` cannot
    script\ndocker run a\ndocker run b\nend script          => 2: `script` cannot
    exec docker run --rm -e A=$(hostname) b                 => 1: `A=$(hostname)` cannot
    exec docker run --rm -e A=`hostname` b                  => 1: `A=`hostname`` cannot
    exec docker run --rm \\\n -e A=$HOME b                  => 2: `A=$HOME` cannot
    env A=1\nexec docker run --rm b $A $AB                  => 2: `$AB` cannot
    env A=1\nexec docker run --rm b ${A:-2}                 => 2: `${A:-2}` cannot''')
def test_what_has_no_equivalent_in_docker_is_refused_by_line(text, said):
    assert refusal(contained, text).startswith('upstart.conf:' + said)

@table('path, name', r"""
    /data                    => shop--data
    /data/                   => shop--data
    /var/lib/postgresql/data => shop--var_lib_postgresql_data
    /var_lib                 => shop--var_5f_lib
    /a\_b                    => shop--a_20_b
    /a-b.c/D9                => shop--a-b.c_D9
    /a:b                     => shop--a_3a_b""")
def test_a_volume_is_named_for_its_path(path, name):
    assert dh.volume_of('shop', path) == name

def test_a_plain_release_becomes_a_container_as_its_dockerfile_says():
    plain_one = release(volumes=['/data', '/var/lib/x'])
    process, = dh.processes_of(plain_one)
    assert dh.plain_container(plain_one, process, '/r/env') == dh.Container(
        ['--net=dockhand', '--ip=10.86.0.2', '--net-alias=blog', '--env-file=/r/env',
         '--add-host=host.docker.internal:10.86.0.1',
         '--volume=blog--data:/data', '--volume=blog--var_lib_x:/var/lib/x'],
        'blog', [], {}, '/', True, '10')

@table('app, alias', '''
    blog            => --net-alias=blog
    api.example.com =>''')
def test_an_app_is_never_a_host_name_with_a_dot_on_the_network(app, alias):
    process, = dh.processes_of(release(app=app))
    options = dh.plain_container(release(app=app), process, '/env').options
    assert [each for each in options if 'alias' in each] == alias.split()

@table('options, said', '''
    --net dockhand --net-alias shop               => only the app shop answers to that
    --net dockhand --network-alias=shop           => only the app shop answers to that
    --network name=dockhand,alias=shop            => only the app shop answers to that
    --net dockhand--machines --net-alias shop     => only the app shop answers to that
    --network name=dockhand,ip=10.86.0.2          => only the app 10.86.0.2 answers
    --net=dockhand --ip 10.86.0.2                 => only the app 10.86.0.2 answers
    --net dockhand --name shop                    => only the app shop answers to that
    --net dockhand --net-alias api.example.com    => only the app api.example.com answers
    --net dockhand --net-alias blog               =>
    --net dockhand --name blog                    =>
    --net other --net-alias shop                  =>
    --net-alias shop                              =>''')
def test_a_job_answers_to_no_other_apps_name_on_the_network(options, said):
    job = dh.parse_job('exec docker run --rm %s blog' % options)
    if said:
        assert 'upstart.conf:1: ' in refusal(dh.check_job, job, 'blog')
        assert said in refusal(dh.check_job, job, 'blog')
    else:
        dh.check_job(job, 'blog')

def test_a_container_has_a_limit_of_processes_unless_it_says_one(plain):
    plain.lives(FILES)
    plain.push(but('job', JOB.replace('--rm', '--rm --pids-limit 9')))
    created, = [line for line in plain.done if line.startswith('docker create')]
    assert re.findall(r'--pids-limit\S*', created) == ['--pids-limit=9']

# ---- Crontabs --------------------------------------------------------------------------

# What is read of a pushed one, by line; what cron reads; and the sh that cron calls.

def in_crontab(text):
    """[(when, command)] of a crontab."""
    return [line[:2] for line in dh.parse_crontab(text)]

def test_a_crontab_is_times_and_commands():
    assert dh.parse_crontab(
        '# every night\n\n0 4 * * *\tbin/report --all\r\n  @daily  bin/tidy \n'
        '*/5 0-6/2,22 1,15-31 JAN,mar-Dec mon-fri date "+\\%F" # x') == [
        dh.CronLine('0 4 * * *', 'bin/report --all', 3),
        dh.CronLine('@daily', 'bin/tidy', 4),
        dh.CronLine('*/5 0-6/2,22 1,15-31 JAN,mar-Dec mon-fri', 'date "+%F" # x', 5)]
    assert in_crontab('# nothing\n\n') == in_crontab('') == []

@table('text', r'''
    0 0 1 1 0 x
    59 23 31 12 7 x
    00 08 09 01 07 x
    *\t* \t * * * x
    0-59/59 0-23/23 */31 1-12/12 0-7/7 x
    * * * feb sun x
    @hourly x
    @midnight x
    @weekly x
    @monthly x
    @yearly x
    @annually x''')
def test_every_time_that_cron_reads_is_taken(text):
    assert [command for _, command in in_crontab(text)] == ['x']

@table('text, said', r'''
    60 * * * * x        => minute `60`: `*`, numbers from 0 to 59,
    * 24 * * * x        => hour `24`:
    * * 0 * * x         => day of the month `0`: `*`, numbers from 1 to 31
    * * 32 * * x        => day of the month `32`
    * * * 0 * x         => month `0`
    * * * 13 * x        => month `13`
    * * * * 8 x         => weekday `8`
    * * * mon * x       => month `mon`
    jan * * * * x       => minute `jan`
    * * * january * x   => month `january`
    5-1 * * * * x       => minute `5-1`
    * * * * fri-sun x   => weekday `fri-sun`
    1- * * * * x        => minute `1-`
    -1 * * * * x        => minute `-1`
    1-2-3 * * * * x     => minute `1-2-3`
    *-5 * * * * x       => minute `*-5`
    ** * * * * x        => minute `**`
    1,, * * * * x       => minute `1,,`
    , * * * * x         => minute `,`
    */0 * * * * x       => minute `*/0`
    */60 * * * * x      => minute `*/60`
    */ * * * * x        => minute `*/`
    */a * * * * x       => minute `*/a`
    */5/5 * * * * x     => minute `*/5/5`
    5/5 * * * * x       => minute `5/5`
    +5 * * * * x        => minute `+5`
    001 * * * * x       => minute `001`
    0~9 * * * * x       => minute `0~9`
    ? * * * * x         => minute `?`
    * * L * * x         => day of the month `L`
    hello world         => minute `hello`
    * * * *             => five times and a command are wanted, as `0 4 * * * bin/report`
    * * * * *           => five times and a command
    * * * * x           => weekday `x`
    @daily              => five times and a command
    @Daily x            => `@Daily`: no such time; there are @hourly @daily
    @every_minute x     => `@every_minute`: no such time
    @ x                 => `@`: no such time
    @reboot x           => `@reboot`: a process that runs always is a line of the Procfile
    A=1                 => `A=`: variables are config: sudo dockhand config APP A=VALUE
    PATH = /bin         => `PATH=`: variables are config
    MAILTO=me           => `MAILTO=`: leave it out: what a line prints goes to the system
    SHELL=/bin/bash     => `SHELL=`: leave it out
    CRON_TZ=UTC         => `CRON_TZ=`: the times are by the clock of the server
    * * * * * root x    => `root`: leave the user out
    * * * * * date +%F  => a bare `%` ends the command in a crontab: write `\\%`
    * * * * * x%        => a bare `%`
    * * * * * x\0       => it holds a control character
    * * * * * x\ey      => it holds a control character
    @daily\n@daily\rx   => it holds a control character''')
def test_a_line_that_cron_or_we_cannot_follow_is_refused(text, said):
    lines = '# one\n@daily one\n' + text.replace('@daily\n', '')
    found = refusal(dh.parse_crontab, lines)
    assert found.startswith('crontab:3: ') and said in found

@pytest.mark.parametrize('data', [b'\xff', b'\xe9', b'\xc3', b'\xed\xa0'])
def test_a_line_of_other_letters_than_utf_8_is_refused(data):
    text = '@daily echo %s\n' % dh.to_text(b'caf\xc3\xa9')
    assert len(in_crontab(text)) == 1
    assert refusal(dh.parse_crontab, text + '@daily ' + dh.to_text(data)) == (
        'crontab:2: its letters are not those of UTF-8')

def test_a_line_stands_there_once():
    twice = '1 * * * * x y\n\n2 * * * * x y\n1  *  * * *  x y\n'
    assert refusal(dh.parse_crontab, twice) == 'crontab:4: the same as line 1'

def test_a_crontab_has_no_more_lines_than_it_may():
    lines = ['* * * * * x %d\n' % number for number in range(101)]
    assert len(in_crontab('# x\n' * 999 + ''.join(lines[:100]))) == 100
    assert refusal(dh.parse_crontab, ''.join(lines)) == 'crontab:101: more than 100 lines'
    longest = '@daily ' + 'x' * 893
    assert len(in_crontab(longest)) == 1
    assert 'crontab:1: longer than 900 characters' in refusal(
        dh.parse_crontab, longest + 'x')

CRONTAB = '# x\n0 4 * * * bin/report --all\n@daily echo "it\'s $1" > /data/x\n'
CRON_FILE = '''# dockhand: blog's crontab, installed from its repository at each push
# Times, and for each the id of a line, of whatever release is live then
SHELL=/bin/sh
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
0 4 * * * root /bin/sh /var/lib/dockhand/apps/blog/live/cron 5bcd4bc1
@daily root /bin/sh /var/lib/dockhand/apps/blog/live/cron 40eef685
'''

def test_cron_reads_times_and_ids_alone():
    assert dh.render_cron_file(release(crontab=CRONTAB)) == CRON_FILE
    assert dh.is_ours(CRON_FILE, 'blog') and not dh.is_ours(CRON_FILE, 'blo')
    for none in (None, '', '# x\n'):
        assert dh.render_cron_file(release(crontab=none)) == ''

@table('app, path', '''
    blog     => /etc/cron.d/dockhand-blog
    my-blog  => /etc/cron.d/dockhand-my-blog
    my_blog  => /etc/cron.d/dockhand-my_blog
    my.blog  => /etc/cron.d/dockhand-my--blog
    a.b.c    => /etc/cron.d/dockhand-a--b--c''')
def test_cron_skips_no_file_for_its_name(app, path):
    dh.check_app_name(app)
    assert dh.cron_path(app) == path and re.match('[A-Za-z0-9_-]+\\Z', path[12:])

def test_the_id_of_a_line_is_its_own_for_as_long_as_it_is_the_same():
    before, after = [[dh.cron_id(line) for line in dh.parse_crontab(text)] for text in (
        '1 * * * * x\n2 * * * * x\n', '# moved\n2 * * * *   x\r\n1 * * * * y\n')]
    assert before[1] == after[0] and len(set(before + after)) == 3

# What the sh of a release calls: docker, which tells what it is told and does as the
# command says; and the system's log, a file.
CRON_DOCKER = '''#!/bin/sh
echo "docker $*" >>calls
case $1 in
ps) [ ! -e down ] || { echo 'Cannot connect'; exit 1; }; cat running 2>/dev/null; exit 0 ;;
rm) exit 1 ;;
esac
while [ "$1" != IMAGE ]; do shift; done
shift
exec "$@"
'''
CRON_LOGGER = '''#!/bin/sh
[ "$1 $2" = '-t dockhand/my.blog' ] || exit 1
shift 2
if [ $# -gt 0 ]; then echo "$*"; else cat; echo; fi >>log
'''

class CronRun(object):
    """The sh of release 2 of my.blog as cron calls it, in a folder."""
    def __init__(self, folder, crontab):
        self.folder = str(folder)
        self.release = release(app='my.blog', number=2, crontab=crontab)
        self.write('docker', CRON_DOCKER)
        self.write('logger', CRON_LOGGER)
        text = dh.render_cron_script(
            self.release, ['--env=KEY', '--env=a.b', '--volume=a b:/data', 'IMAGE'],
            {'KEY': "it's\na key", 'a.b': 'c\nd'})
        for path in (dh.STATE, dh.CRON_LOCKS):
            text = text.replace(path, self.folder + '/' + os.path.basename(path))
        self.write('script', text)
        self.stopped = self.folder + '/dockhand/apps/my.blog/stopped'
        dh.make_folder(os.path.dirname(self.stopped))

    def write(self, name, text):
        dh.replace_file(os.path.join(self.folder, name), text, 0o755)

    def text(self, name):
        return dh.read_file(os.path.join(self.folder, name)) or ''

    def start(self, *words):
        path = '%s:%s' % (self.folder, os.environ['PATH'])
        return subprocess.Popen(['sh', 'script'] + list(words), cwd=self.folder,
                                env={'PATH': path}, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, preexec_fn=os.setsid)

    def run(self, line=0):
        """Run a line to its end; what it said to cron, which mails that to root."""
        return dh.to_text(self.start(self.id(line)).communicate()[0])

    def id(self, line=0):
        return dh.cron_id(dh.cron_lines(self.release)[line])

LIVES = "sh -c 'echo begun; while [ ! -e end ]; do sleep 0.05; done'"

def test_the_sh_of_a_release_runs_the_line_that_cron_names(tmpdir):
    cron = CronRun(tmpdir, '@daily printf %s-%s a\\*b "c  d"\n@daily echo x\n'.replace(
        '%', '\\%'))
    assert cron.run(0) == ''
    name = 'my.blog--2--cron-' + cron.id(0)
    assert cron.text('calls').splitlines() == [
        'docker ps -q --filter name=^/*my[.]blog--[0-9]*--cron-%s$' % cron.id(0),
        'docker rm ' + name,
        'docker run --rm --name %s --env=KEY --env=a.b=c' % name,
        'd --volume=a b:/data IMAGE sh -c exec printf %s-%s a\\*b "c  d"']
    assert "export KEY='it'\"'\"'s\na key'\n" in cron.text('script')
    assert cron.text('log') == 'a*b-c  d\ncrontab:1: exit status 0 (my.blog--2)\n'
    cron.run(1)
    assert cron.text('log').endswith('\nx\n\ncrontab:2: exit status 0 (my.blog--2)\n')

def test_what_a_line_prints_and_how_it_ends_is_in_the_log(tmpdir):
    cron = CronRun(tmpdir, '@daily echo out; echo err >&2; exit 3\n@daily missing-command')
    assert [cron.run(0), cron.run(1)] == ['', '']
    assert re.match(r'out\nerr\n\ncrontab:1: exit status 3 \(my.blog--2\)\n'
                    r'.*missing-command: not found\n\n'
                    r'crontab:2: exit status 127 \(my.blog--2\)\n\Z', cron.text('log'))

@each('word', 'unknown * $(touch) 0')
def test_a_line_that_is_not_the_releases_own_does_not_run(tmpdir, word):
    cron = CronRun(tmpdir, '@daily echo x')
    for words in ((word,), (), ('',)):
        process = cron.start(*words)
        assert (process.communicate()[0], process.returncode) == (b'', 0)
    assert cron.text('calls') == cron.text('log') == ''

def test_no_line_runs_while_the_app_is_stopped(tmpdir):
    cron = CronRun(tmpdir, '@daily echo x')
    cron.write(cron.stopped, '')
    assert (cron.run(), cron.text('calls'), cron.text('log')) == ('', '', '')
    os.unlink(cron.stopped)
    cron.run()
    assert cron.text('log') == 'x\n\ncrontab:1: exit status 0 (my.blog--2)\n'

def begun(cron):
    """A line that goes on until the file `end` is there."""
    process = cron.start(cron.id())
    deadline = time.time() + 20
    while 'begun' not in cron.text('log') and time.time() < deadline:
        time.sleep(0.01)
    return process

def test_a_line_that_still_runs_is_not_started_again_and_others_are(tmpdir):
    cron = CronRun(tmpdir, '@daily %s\n@daily echo other' % LIVES)
    process = begun(cron)
    assert [cron.run(0), cron.run(1)] == ['', '']
    assert re.findall('crontab:.*', cron.text('log')) == [
        'crontab:1: not started, since it still runs',
        'crontab:2: exit status 0 (my.blog--2)']
    cron.write('end', '')
    process.communicate()
    cron.run(0)
    assert cron.text('log').endswith('crontab:1: exit status 0 (my.blog--2)\n')
    assert cron.text('calls').count('docker run') == 3

def test_a_line_whose_sh_was_killed_is_not_started_beside_it(tmpdir):
    cron = CronRun(tmpdir, '@daily ' + LIVES)
    process = begun(cron)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    cron.run()
    assert 'crontab:1: not started, since it still runs\n' in cron.text('log')
    assert cron.text('calls').count('docker run') == 1
    cron.write('end', '')
    deadline = time.time() + 20
    while cron.text('calls').count('docker run') < 2 and time.time() < deadline:
        cron.run()
    assert cron.text('calls').count('docker run') == 2

def test_a_line_whose_docker_client_was_killed_is_not_started_beside_it(tmpdir):
    cron = CronRun(tmpdir, '@daily echo x')
    cron.write('running', '0123abcd\n')
    assert cron.run() == ''
    assert cron.text('log') == (
        'crontab:1: not started, since it still runs in container 0123abcd\n')
    assert cron.text('calls').count('docker') == 1

def test_a_line_is_not_started_where_docker_does_not_answer(tmpdir):
    cron = CronRun(tmpdir, '@daily echo x')
    cron.write('down', '')
    assert cron.run() == ''
    assert cron.text('log') == 'crontab:1: not started: Cannot connect\n'

@pytest.mark.parametrize('command', [
    "echo 'a b' \"c\"", 'echo a*b', 'echo $0', 'echo `echo x`', 'echo a\\\\b; echo $(echo y)',
    'echo \'"\'"\'"', 'echo ' + dh.to_text(b'caf\xc3\xa9') + ' $0', 'echo {a}', 'echo {{a}} }', 'echo ${HOME:-none}'])
def test_a_shell_reads_of_a_command_what_was_pushed(tmpdir, command):
    """That of the container does, once: root's reads a quoted word."""
    cron = CronRun(tmpdir, '@daily ' + command)
    cron.run()
    wanted = subprocess.check_output(['sh', '-c', dh.to_bytes(command)],
                                     env={'PATH': os.environ['PATH']})
    assert cron.text('log').startswith(dh.to_text(wanted))

# ---- Proxy files -----------------------------------------------------------------------

def listens(text):
    return [tuple(listen)[:3] for server in dh.servers_of(text)
            for listen in server.listens]

@table('value, address, port', '''
    80                 => *                => 80
    *:81               => *                => 81
    *                  => *                => 80
    0.0.0.0:80         => *                => 80
    127.0.0.1:81       => 127.0.0.1        => 81
    127.0.0.1          => 127.0.0.1        => 80
    localhost:81       => localhost        => 81
    [::]:80            => [::]             => 80
    [::1]              => [::1]            => 80
    unix:/run/x.sock   => unix:/run/x.sock =>''')
def test_a_listen_directive_is_read(value, address, port):
    for flag, default in (('', False), (' ssl', False), (' default_server', True),
                          (' ipv6only=on default', True)):
        found = listens('server { listen %s%s; }' % (value, flag))
        assert found == [(address, port, default)]

PROXY = '''# blog's {{
map $http_upgrade $connection { default upgrade; '' close; }
upstream blog { server 127.0.0.1:8000; }   # server { }
server {
    listen 80; listen [::]:80;
    server_name Blog.example.org "www.example.org"
        .example.net;
    if ($host ~ "^a{2}") { return 404; }
    location / { proxy_pass http://localhost:8001; set $x "server { listen 9; }"; }
}
server
{ location / { root /x/${host}; } }
server { listen; server_name; }'''

def test_the_servers_of_a_file_are_read():
    assert [(server.place, server.names) for server in dh.servers_of(PROXY, 'f')] == [
        ('f:4', ['blog.example.org', 'www.example.org', 'example.net', '*.example.net']),
        ('f:11', ['']), ('f:13', [''])]
    assert [listen[0] for listen in listens(PROXY)] == ['*', '[::]', '*', '*']
    assert dh.proxied_ports(PROXY) == set(['8000', '8001']) and not dh.proxied_ports(None)

@table('text', r'''
    }
    }}server{
    {
    ;;
    "
    server { listen '
    server {
    server;
    \\
    events {} } server
    server { listen 80
    a{b{c{
    \0
    ${
    server {} }''', '')
def test_a_broken_file_is_left_for_nginx_to_refuse(text):
    assert isinstance(dh.servers_of(text), list)

def proxied(text, other):
    others = dh.servers_of(other, '/etc/nginx/conf.d/w.conf')
    dh.check_proxy(dh.servers_of(text), others)

def blocks(text):
    """Server blocks written shorter: {a 81} is named a, listens on 81; - is no name."""
    def block(match):
        name, _, more = match.group(1).partition(' ')
        words = ['listen %s;' % listen for listen in more.split(', ') if listen]
        words += ['server_name %s;' % name] if name != '-' else []
        return 'server { %s }' % ' '.join(words)
    return re.sub(r'\{(.*?)\}', block, text)

@table('text, other, said', r'''
    {a} => \n{a} => 1: server_name "a" is taken on port 80, by /etc/nginx/conf.d/w.conf:2
    \n{A.org}     => {a.ORG}       => 2: server_name "a.org" is taken
    {.a.org}      => {*.a.org}     => 1: server_name "*.a.org" is taken
    {*.a.org}     => {.a.org}      => 1: server_name "*.a.org" is taken
    {a.org}       => {.a.org}      => 1: server_name "a.org" is taken
    {a 81}        => {a 81}        => 1: server_name "a" is taken on port 81
    {a 80, 81}    => {a 81}        => 1: server_name "a" is taken on port 81
    {a}{b}        => {b}           => 1: server_name "b" is taken
    {- 80 default_server} => {- *:80 default_server} => 1: default_server is taken
    {- 80 default} => {x 0.0.0.0:80 default_server}  => 1: default_server is taken
    {_ 81}        => {_ 81}        => 1: server_name "_" is taken
    {- 8081}      => {- 8081}      => 1: server_name "" is taken on port 8081
    \n{-}         =>               => 2: no request reaches this server: give it a
    {_}           =>               => 1: no request
    {"" 443}      =>               => 1: no request
    {a}\n{- 80}   =>               => 2: no request
    {a 127.0.0.1:80} =>            => 1: `listen 127.0.0.1:80` would take all requests
    {a [::1]:80}  =>               => 1: `listen [::1]:80` would take
    {a localhost} =>               => 1: `listen localhost:80` would take
    {a 10.0.0.1:81} => {- 81}      => 1: `listen 10.0.0.1:81` would take
    {a 10.0.0.1:81} => {b [::]:81} => 1: `listen 10.0.0.1:81` would take''')
def test_a_proxy_file_that_takes_what_another_has_is_refused_by_line(text, other, said):
    message = refusal(proxied, blocks(text), blocks(other))
    assert message.startswith('nginx-proxy.conf:' + said)

@table('text, other', '''
    {a.org} => {b.org aa.org a.org.uk}
    {a}     => {a 81}
    {x.a}   => {.a}
    {- 80 default_server}    => {_}{a}
    {- 80 default_server}    => {- 81 default_server}
    {_ 443 default_server}   => {_}
    {- 8081}                 => {- 8082}
    {- 127.0.0.1:8081}       => {- 127.0.0.1:8082}
    {a unix:/run/x}          => {b}
    upstream b { server x; } => {a}''')
def test_a_proxy_file_beside_another_is_taken(text, other):
    proxied(blocks(text) if 'up' not in text else text, blocks(other))

# ---- Proxy files read as nginx reads them ----------------------------------------------

def directives(text):
    """What is read of a text, one directive a line, a block indented."""
    def lines(found, depth):
        for directive in found:
            yield '  ' * depth + '|'.join(directive.words) + (
                '' if directive.inside is None else ' {')
            for line in lines(directive.inside or (), depth + 1):
                yield line
    return '\n'.join(lines(dh.NginxReader(text).directives, 0))

@table('text, read', r'''
    a b;                  => a|b
    a\tb\r\nc ;           => a|b|c
    a "b c" 'd;e';        => a|b c|d;e
    a b"c'd;              => a|b"c'd
    a b#c; # d;           => a|b#c
    a"b;                  => a"b
    a \\;b;               => a|\\;b
    a "\\"" '\\'' \\\\;   => a|"|'|\\
    a "b\\tc";            => a|b\tc
    a ${b}c;              => a|${b}c
    a "}" '{';            => a|}|{
    a (b);                => a|(b)
    if ("a")b { }         => if|("a")b {''')
def test_the_words_of_a_file_are_those_that_nginx_reads(text, read):
    assert directives(text) == read

@table('text, line, said', r'''
    a b                     => 1 => a directive without `;`
    a {                     => 1 => a block without `}`
    \na { b; } }            => 2 => `}` where nginx wants none
    a b } c;                => 1 => `}` where nginx wants none
    ;                       => 1 => `;` where nginx wants none
    {                       => 1 => `{` where nginx wants none
    a "b                    => 1 => a quote or a word that does not end
    a "b"c;                 => 1 => something directly behind a closing quote
    a 'b'"c";               => 1 => something directly behind a closing quote
    a\n b\\                 => 2 => a quote or a word that does not end
    set $x a};              => 1 => `a}`: put what holds
    a;\nset $x b{c} d;      => 2 => put what holds
    a ${b;                  => 1 => `${b`: put what holds
    a $x${;                 => 1 => put what holds
    a;\nb \_\0;             => 2 => a control character
    include x;              => 1 => `include`: it is not read here
    a {\n\n include /x; }   => 3 => `include`: it is not read here
    include ../fastcgi_params;    => 1 => `include`: it is not read here
    content_by_lua_block { x }    => 1 => `content_by_lua_block`: it is not read here''')
def test_what_nginx_would_refuse_or_read_in_another_way_is_told_by_line(text, line, said):
    troubles = dh.NginxReader(text).troubles
    assert any(at == int(line) and said in told for at, told in troubles), troubles

@pytest.mark.parametrize('text', [
    'set $x a};', 'set $x a\x0b#;', 'set $x a\x0c#;', 'set $x "a"b;', 'set $x ${a;',
    'set $x a"b;', 'set $x \\";', "set $x a\\'b;", 'set $x a#b;', 'set $x \\};'])
def test_no_name_is_hidden_behind_what_nginx_reads_otherwise(text):
    """Many were read without the name, by an older reader, and taken by nginx."""
    text = 'server { listen 80; %s server_name shop.*; }' % text
    reader = dh.NginxReader(text)
    names = [name for server in dh.servers_in(reader.directives, 'f')
             for name in server.names]
    assert reader.troubles or 'shop.*' in names

@each('name', '''fastcgi_params /etc/nginx/proxy_params scgi_params
      /etc/nginx/uwsgi_params''')
def test_the_distributions_parameters_may_be_included(name):
    assert dh.NginxReader('location / { include %s; }' % name).troubles == []

def test_each_directive_knows_where_it_begins_and_ends():
    text = '# x\nserver {\n    listen 80;  # y\n    location / { root /a; }\n}\n'
    server, = dh.NginxReader(text).directives
    assert (server.line, text[server.begin:server.end]) == (2, text[4:-1])
    assert [(each.line, text[each.begin:each.end]) for each in server.inside] == [
        (3, 'listen 80;'), (4, 'location / { root /a; }')]

@pytest.mark.parametrize('text', [
    'a;', 'a{', '}', '{', '"', "'", '\\', '$', '${', '#', ' ', 'a ', '#\n', 'a"', '""',
    '"" ', ';', '\n', 'listen 80;', '\\a'])
def test_a_long_file_of_anything_is_read_in_one_pass(text):
    """That takes the time of one pass is measured elsewhere; a deep file ends it."""
    dh.read_proxy_file((text * (2 ** 18 // len(text))))
    dh.read_proxy_file('server{' + text * (2 ** 17 // len(text)))

def judged(text):
    """All that is asked of a proxy file that is pushed, but for nginx itself."""
    other = dh.read_proxy_file('server { server_name *.b.org ~x$ b; }',
                               '/etc/nginx/conf.d/wiki.conf')
    file = dh.read_proxy_file(text)
    trees = [('/etc/nginx/conf.d/wiki.conf', other.directives)]
    if not dh.rule_problems('blog', file.directives, trees, MODERN):
        theirs = dh.claims_of(other.servers, '/etc/nginx/conf.d/wiki.conf')
        ours = dh.claims_of(file.servers, '/etc/nginx/conf.d/blog.conf')
        dh.taken_name(ours, theirs, None)
        dh.taken_name(theirs, ours, None)
        dh.check_proxy(file.servers, other.servers)
    list(dh.proxy_doubts(file.directives))
    dh.render_catch_all(file.servers, MODERN, True)
    dh.plain_place(file.servers)
    dh.proxied_ports(text)

@table('begin, end', r"""
    =>
    => x;
    server {                                       => }
    server { server_name\_                         => ; }
    server { server_name "~                        => "; }
    server { server_name ~                         => ; }
    server { server_name ~^                        => $; }
    server { server_name a; listen\_               => ; }
    server { server_name a; listen 127.0.0.1:      => ; }
    server { server_name a; root\_                 => ; }
    server { server_name a; access_log /var/log/nginx/blog- => ; }
    server { server_name a; proxy_pass http://     => ; }
    server { server_name a; x\_                    => ; }
    map "                                          => " $b { }
    map $a $b {                                    => }""")
def test_a_proxy_file_is_judged_in_one_pass_whatever_it_says(begin, end):
    """What takes the square of its length does not end here."""
    for text in hostile('x', '1', '-i', '. ', 'a{', '(?<a>', '${', '\\'):
        with ending():
            try:
                judged(begin + text + end)
            except Failure as failure:
                assert str(failure).startswith('nginx-proxy.conf:')

# ---- What one app's file may say beside the others' ------------------------------------

MODERN = (1, 22, 1)

def problems(text, others='', version=MODERN, app='shop', known=None):
    """What is wrong with a pushed file beside another app's, `wiki`."""
    trees = [('/etc/nginx/conf.d/wiki.conf', dh.NginxReader(others).directives)]
    found = dh.rule_problems(app, dh.NginxReader(text).directives, trees, version, known)
    return ['%d: %s: %s' % (directive.line, directive.words[0], said)
            for directive, said in found]

OUTSIDE = 'outside of `server { }` it holds for every app: write it inside'

@each('name', '''auth_basic auth_basic_user_file deny allow gzip client_max_body_size
      add_header proxy_set_header real_ip_header set_real_ip_from error_page limit_req
      limit_conn root proxy_buffering server_names_hash_bucket_size js_import
      lua_package_path resolver ssl_protocols ssl_session_cache access_log
      keepalive_timeout types''')
def test_what_stands_above_the_server_reaches_all_and_is_refused(name):
    above = problems('\n%s x;\nserver { server_name a; }' % name)
    assert '2: %s: %s' % (name, OUTSIDE) in above
    inside = problems('server { server_name a; %s x; }' % name)
    assert OUTSIDE not in str(inside)

@table('text', r'''
    upstream a { server 10.0.0.1; keepalive 4; } server { server_name a; }
    map $http_upgrade $up { default upgrade; '' close; }
    geo $near { default 0; 10.0.0.0/8 1; }
    geo $remote_addr $near { default 0; }
    split_clients $remote_addr $half { 50% a; * b; }
    limit_req_zone $binary_remote_addr zone=shop:1m rate=1r/s;
    limit_conn_zone $binary_remote_addr zone=shop:1m;
    proxy_cache_path /var/cache/nginx/shop levels=1:2 keys_zone=shop:1m;
    proxy_cache_path /var/cache/nginx/shop/a keys_zone=shop:1m use_temp_path=off;
    log_format shop '$status';
    server { access_log /var/log/nginx/shop.log; error_log /var/log/nginx/shop-e.log; }
    server { access_log off; error_log syslog:server=10.0.0.1; }
    fastcgi_cache_path /var/cache/nginx/shop keys_zone=shop:1m;
    server { location ~ php$ { include snippets/fastcgi-php.conf; fastcgi_cache shop; } }
    server { include /etc/nginx/mime.types; ssl off; ssl_certificate data:$x; }
    server { root /srv/a; location /a { alias /srv/b/; } auth_basic_user_file /etc/x; }
    server { ssl_certificate /etc/a; ssl_certificate_key /etc/b; ssl_dhparam /etc/d; }
    server { location / { try_files $uri /a.html; error_page 404 /b; return 301 /a; } }
    server { location ~ php$ { include fastcgi_params; fastcgi_pass unix:/run/x.sock; } }
    server { if ($a ~ "^/x{2}") { rewrite ^/a /b; } add_header A /b; set $a /c; }
    server { listen [::]:80 ipv6only=on; }
    server { listen 443 ssl http2; }
    server { listen 8443 ssl http2 proxy_protocol deferred; }
    server { location ~ "^/(?<shop_id>[0-9]+)" { } set $mine 1; }
    server { proxy_store on; types { text/plain /x; } }''')
def test_what_keeps_to_its_own_server_is_taken(text):
    assert problems(text) == []

@table('text, said', r'''
    server { client_body_temp_path /etc/x; }   => may name files with root, alias
    server { client_body_temp_path x; }        => may name files with root, alias
    server { proxy_temp_path /x; }             => may name files
    server { error_log /etc/x.log; }           => its place is /var/log/nginx/shop.log
    server { error_log x.log; }                => its place is /var/log/nginx/shop.log
    server { access_log /var/log/nginx/wiki.log; } => its place is /var/log/nginx/shop.log
    server { access_log /var/log/nginx/shop-../../x.log; } => its place is
    server { access_log /var/log/nginx/$host.log; }    => its place is
    server { access_log /var/log/nginx/shopx.log; }    => its place is
    server { access_log syslog:server=unix:/run/x; }   => its place is
    server { access_log syslog:server=UNIX:/run/x; }   => its place is
    server { location / { access_log /x; } }   => its place is
    proxy_cache_path /var/cache/nginx/wiki keys_zone=s:1m; => its place is /var/cache/nginx/shop
    proxy_cache_path /var/cache/nginx/shop/../wiki keys_zone=s:1m; => its place is
    proxy_cache_path /var/cache/nginx/shopping keys_zone=s:1m; => its place is
    server { root /srv/../etc; }               => without `..`
    server { location / { alias ..; } }        => without `..`
    server { ssl_certificate /a/../b; }        => without `..`
    server { ssl_password_file x; }            => may name files
    server { ssl_session_ticket_key x; }       => may name files
    server { js_import a from x; }             => may name files
    server { xslt_stylesheet x; }              => may name files
    server { modsecurity_rules_file /x; }      => may name files
    server { some_module_of_tomorrow /x; }     => may name files
    server { some_module_of_tomorrow path=/x; } => may name files
    server { proxy_store /x; }                 => may name files
    server { listen unix:/run/x; }             => listen on a port instead of a file
    server { ssl_certificate_key engine:/x.so:y; } => write the path of a file
    server { ssl_certificate store:x; }        => write the path of a file
    server { ssl_certificate /proc/kmsg; }     => this is no place for files
    server { root /dev/; }                     => this is no place for files
    server { ssl_certificate /./proc/kmsg; }   => this is no place for files
    server { ssl_certificate /etc//../x; }     => without `..`
    server { client_body_temp_path off; }      => may name files with root, alias
    fastcgi_cache_path /x keys_zone=a:1m;      => its place is /var/cache/nginx/shop
    server { listen UNIX:/run/x; }             => listen on a port instead of a file
    server { listen 7000-7005; }               => write each port by itself
    server { server_name $hostname a; }        => write the name itself
    server { set $z a; proxy_cache $z; }       => write the name of the cache itself
    server { listen 80 default_server; large_client_header_buffers 1 1k; } => holds for
    server { ssl ON; }                         => write `listen 443 ssl;`
    server { ssl on; }                         => write `listen 443 ssl;`''')
def test_files_that_a_test_of_nginx_would_open_or_make_are_refused(text, said):
    assert said in str(problems(text))

@table('text, version, said', r'''
    80 proxy_protocol       => 1.26.0 => `proxy_protocol` would hold for all on port 80
    80 http2                => 1.22.1 => `http2` would hold for all on port 80
    80 http2                => 1.25.0 => `http2`
    80 http2                => 1.25.1 =>
    80 ssl                  => 1.26.0 => `ssl`
    [::]:80 backlog=9       => 1.26.0 => `backlog=9`
    80 deferred             => 1.26.0 => `deferred`
    80 reuseport            => 1.26.0 => `reuseport`
    443 quic reuseport      => 1.26.0 => on port 443
    443                     => 1.26.0 => `ssl` would hold for all on port 443, or
    443 ssl proxy_protocol  => 1.26.0 => `proxy_protocol` would hold for all on port 443
    443 ssl http2           => 1.14.0 =>
    8080 proxy_protocol     => 1.26.0 => `proxy_protocol`
    8080                    => 1.26.0 =>
    8443 ssl                => 1.26.0 =>
    8443                    => 1.26.0 => `ssl`
    9000 proxy_protocol     => 1.26.0 =>
    0080 proxy_protocol     => 1.26.0 => `proxy_protocol`
    80 default_server       => 1.26.0 =>''')
def test_the_words_of_a_socket_are_those_of_all_on_its_port(text, version, said):
    others = ('server { listen 80; listen 8080 default_server; } '
              'server { listen 8443 ssl default_server; }')
    found = problems('server { listen %s; }' % text, others,
                     tuple(int(part) for part in version.split('.')))
    assert said in str(found) if said else found == []

UPGRADE = "map $http_upgrade $up { default upgrade; '' close; }"

@table('text, others, said', r'''
    map $a $up { default 1; } => map $b $up { default 1; } => wiki has a variable of
    geo $up { default 1; } => map $b $up { default 1; } => wiki has a variable of
    map $a $up { x 1; default 1; } => map $a $up { default 1; x 1; } => wiki has a var
    split_clients $a $up { * x; } => geo $b $up { default 1; } => wiki has a variable of
    upstream a { server b; } => upstream a { server b; } => wiki has a upstream
    log_format a b; => log_format a b; => wiki has a log_format
    limit_req_zone $a zone=z:1m rate=1r/s; => limit_conn_zone $a zone=z:2m; => has a zone
    proxy_cache_path /var/cache/nginx/shop keys_zone=z:1m; => limit_conn_zone $a zone=z:2m; => a zone
    map $a $args { default x; }          =>  => this is a variable of nginx
    map $a $http_upgrade { default x; }  =>  => this is a variable of nginx
    geo $limit_rate { default 1; }       =>  => this is a variable of nginx
    map $a $HTTP_host { default x; }     =>  => this is a variable of nginx
    map $a $proxy_host { default x; }    =>  => this is a variable of nginx
    map $a $ssl_protocol { default x; }  =>  => this is a variable of nginx
    server { location ~ "(?<args>x)" { } }         =>  => it captures $args
    server { server_name "~^(?<http_host>.+)$"; }  =>  => it captures $http_host
    server { if ($a ~ "(?P<up>x)") { return 200; } } => map $a $up { default 1; } => it captures $up
    map $a $b { "~(?'up'x)" 1; }    => map $a $up { default 1; }     => it captures $up
    map $a $up { default 1; } => server { rewrite "(?<up>x)" /; } => another file sets a
    map $a $Up { default 1; } => server { set $uP 1; } => another file sets a
    map $a $UP { default 1; } => map $b $up { default 1; } => wiki has a variable
    server { location ~ "(?<UP>x)" { } } => map $a $up { default 1; } => it captures $up
    upstream localhost { server b; } => server { location / { proxy_pass http://localhost:80/; } } => passes requests''')
def test_what_a_file_defines_for_all_has_a_name_of_its_own(text, others, said):
    assert said in str(problems(text, others))

@table('text, others', r'''
    %s => %s
    map $a $up { default 1; } => map $a $down { default 1; }
    server { set $up 1; }     => map $a $up { default 1; }
    server { rewrite "(?<up>x)" /; } => server { rewrite "(?<up>y)" /; }
    '''.rstrip() % (UPGRADE, UPGRADE))
def test_the_same_table_may_stand_in_two_files(text, others):
    assert problems(text, others) == []

def test_who_may_not_know_of_an_app_is_not_told_its_name():
    for known, who in ((None, 'wiki'), (['wiki'], 'wiki'), ([], 'something else here'),
                       (['shop'], 'something else here')):
        said, = problems('log_format a b;', 'log_format a c;', known=known)
        assert who + ' has a log_format' in said

# ---- Host names, as nginx ranks them ---------------------------------------------------

@table('name, other, taken', r'''
    hello.org         => hello.org        => no
    shop.org          => shop.*           => yes
    shop.co.uk        => shop.*           => yes
    shops.org         => shop.*           => no
    shop              => shop.*           => no
    a.org             => *.org            => yes
    a.b.org           => *.org            => yes
    org               => *.org            => no
    *.org             => shop.*           => yes
    *.org             => shop             => no
    *.org             => shop.org         => no
    *.b.org           => *.org            => yes
    *.org             => *.b.org          => no
    *.ab.org          => *.b.org          => no
    shop.eu.*         => shop.*           => yes
    shop.*            => shop.eu.*        => no
    shop.*            => *.org            => no
    shop.*            => _                => no
    *.org             =>                  => no
    shop.org          => ~^shop           => yes
    shop.org          => ~^wiki           => no
    shop.org          => ~^SHOP\\.org$    => yes
    shop.org          => ~(               => yes
    shop.org          => ~^(.+)+!$        => yes
    shop.org          => ~^h[[:digit:]]$  => yes
    shop.org          => ~a{99999999999}  => yes
    shop.*            => ~^foo\\.org|shop\\.org$ => yes
    shop.*            => ~^Shop\\.org$    => yes
    shop.*            => ~^shops?\\.net$  => yes
    shop.*            => ~^www\\.         => no
    shop.*            => ~^shop\\.org$    => yes
    shop.*            => ~^(.+)\\.users\\.org$ => yes
    *.org             => ~^(.+)\\.net$    => no
    *.org             => ~^(.+)\\.org$    => yes
    *.a.org           => ~^(?<x>.+)\\.org$ => yes
    ~^shop\\.         => shop.*           => yes
    *.b               => ~^shop\\.\\w$    => yes
    *.b               => ~^shop\\.\\x62$  => yes
    *.b               => ~^shop\\.c$      => no
    ~^wiki\\.         => shop.*           => no
    ~.                => shop             => yes
    ~^(?<a>.+)$       => shop             => yes
    ~^x$              => ~^y$             => no
    _                 => shop.*           => no''')
def test_a_name_takes_requests_from_those_that_nginx_ranks_below_it(name, other, taken):
    assert dh.takes_from(name, other) == (taken == 'yes')

def taken(ours, theirs, known=None, may_take=(), path='/etc/nginx/conf.d/hello.conf'):
    claims = [dh.claims_of(dh.servers_of(blocks(text), where), where) for text, where in (
        (ours, path), (theirs, '/etc/nginx/conf.d/shop.conf'))]
    return dh.taken_name(claims[0], claims[1], known, may_take)

def test_a_name_that_another_app_would_lose_is_told_with_both_and_what_to_type():
    assert taken('{shop.example.com}', '{shop.*}') == (
        '/etc/nginx/conf.d/hello.conf:1: "shop.example.com" would take requests from '
        'shop, which has "shop.*": give that full names of its own first: '
        'dockhand config shop domains="..."')
    assert taken('{shop.example.com}', '{shop.*}', ['hello']) == (
        '/etc/nginx/conf.d/hello.conf:1: the host name "shop.example.com" is taken on '
        'this server')

def test_ports_80_and_443_count_as_one_and_others_apart():
    assert taken('{shop.org 443 ssl}', '{shop.*}')
    assert taken('{shop.org}', '{shop.* 443 ssl}')
    assert taken('{shop.org 81}', '{shop.*}') is None
    assert 'shop.*' in taken('{a 81}{shop.org 81}', '{shop.* 81}')
    assert 'server_name "a" is taken on port' in refusal(
        proxied, blocks('{a 443 ssl}'), blocks('{a}'))

def test_root_may_take_a_full_name_out_of_a_wildcard():
    assert taken('{shop.org}', '{shop.*}', None, ['shop.org']) is None
    assert taken('{shop.org}', '{~^shop}', None, ['shop.org'])
    assert taken('{*.org}', '{shop.*}', None, ['*.org'])

def test_of_two_expressions_the_one_that_is_read_first_has_a_request():
    assert taken('{~^a}', '{~^b}')
    assert taken('{~^a}', '{~^b}', path='/etc/nginx/conf.d/wiki.conf') is None
    assert taken(r'{~^(.+)\.a\.org$}', r'{~^(.+)\.b\.org$}') is None
    assert taken(r'{~^(.+)\.a\.org$}', r'{~^(.+)\.org$}')

def test_an_expression_that_ends_in_an_escape_may_match_what_another_does():
    assert dh.may_both_match(r'~^app\d\.example\.com$', r'~^\w*1\.example\.com$')
    assert not dh.may_both_match(r'~^app\d\.example\.com$', r'~^\w*1\.example\.net$')

def test_the_first_file_of_a_port_keeps_the_requests_for_unknown_names():
    without = 'server { listen 9000; }'
    for app, others, is_refused in (
            ('shop', without, True), ('zoo', without, False),
            ('shop', 'server { listen 9000 default_server; }', False)):
        found = problems('server { listen 9000; server_name a; }', others, app=app)
        assert ('would lose the' in str(found)) == is_refused

@pytest.mark.parametrize('text', [
    'server { server_name %s; }' % ' '.join('a%d.org' % at for at in range(201)),
    'server { %s }' % ''.join('listen %d;' % at for at in range(9000, 9051)),
    ''.join('map $a $b%d { }' % at for at in range(101))])
def test_a_file_that_says_more_than_a_person_writes_is_refused(text):
    assert len(problems(text)) == 1 and 'of these in a file' in problems(text)[0]

@pytest.mark.parametrize('text', [
    'server { server_name "~%s"; }' % ('(' * 900 + ')' * 900),
    'server { server_name "~^(.+)+!$" "~^(([a-z0-9-]+)+\\\\.)+shop$" "~a{9999999999}"; }',
    'server { server_name %s; }' % ' '.join('*.a%d.org' % at for at in range(200))])
def test_no_name_takes_long_to_be_compared(text):
    name = 'a' * 60 + '.org'
    others = [dh.Claim(each, '/x', '80', '') for each in (
        [name, '~^(.+)+x$', '~' + '(a*)*' * 9] + ['b%d.*' % at for at in range(3000)])]
    dh.taken_name(dh.claims_of(dh.servers_of(text), '/y'), others, None)

def test_a_host_that_must_be_looked_up_is_doubtful():
    text = ('upstream a.b { server 10.0.0.1; }\n'
            'server { location / { proxy_pass http://a.b; } '
            'location /x { proxy_pass http://10.0.0.1; }\n'
            'location /y { proxy_pass http://backend.lan:80/; } '
            'location /z { proxy_pass http://$a.b; } }')
    assert [line for line, _ in dh.proxy_doubts(dh.NginxReader(text).directives)] == [3]

# ---- Proxy files that are made ---------------------------------------------------------

# Those of plain apps, the catch-all, and the address that a push ends with.

CATCH_ALL = '''# dockhand: what no app answers to; written anew when the apps change
server {
    listen 80%s;%s
    server_name _;
    return 404;
}
'''
REFUSE = '''server {
    listen 443 ssl;%s
    server_name _;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_ciphers ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:\
ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384:\
ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305;
    ssl_prefer_server_ciphers off;
    ssl_session_cache shared:dockhand:10m;
    ssl_session_timeout 1d;
    ssl_session_tickets off;
%s}
'''
REJECT = REFUSE % ('%s', '    ssl_reject_handshake on;\n')
NO_CERTIFICATE = REFUSE % ('', '''    set $dockhand_none "";
    ssl_certificate data:$dockhand_none;
    ssl_certificate_key data:$dockhand_none;
    return 444;
''')
CHALLENGE_ALL = '''    if ($uri ~ "^/\\.well-known/acme-challenge/") { break; }
    location ^~ /.well-known/acme-challenge/ {
        root /var/lib/dockhand/acme;
        auth_basic off; allow all; default_type text/plain;
    }
    return 404;
'''
PLAIN_ALL, OLD_ALL = CATCH_ALL % ('', ''), CATCH_ALL % (' default_server', '')
HEAD, _, REST = PLAIN_ALL.partition('server')
TOLD_ALL = HEAD + '''map $request_uri $dockhand_token {
    default "";
    /.well-known/dockhand abcd1234;
}
add_header X-Dockhand $dockhand_token always;
server''' + REST
V6 = '\n    listen [::]:80%s;'

@pytest.mark.parametrize('text, version, ipv6, expected', [
    ('', (1, 24, 0), False, PLAIN_ALL), ('', (1, 24, 0), True, PLAIN_ALL),
    ('{a [::]:80}', (1, 24, 0), True, CATCH_ALL % ('', V6 % '')),
    ('{a [::]:80}', (1, 24, 0), False, PLAIN_ALL),
    ('', (1, 1, 19), False, OLD_ALL), ('', (1, 3, 9), False, OLD_ALL),
    ('', (1, 3, 10), False, PLAIN_ALL),
    ('{a [::]:80}', (1, 1, 19), True,
     CATCH_ALL % (' default_server', V6 % ' ipv6only=on')),
    ('{- 80 default}', (1, 1, 19), False, PLAIN_ALL),
    ('{- 81 default}', (1, 1, 19), False, OLD_ALL),
    ('{a 443 ssl}', (1, 19, 4), False, PLAIN_ALL + REJECT % ''),
    ('{a 443 ssl}', (1, 19, 3), False, PLAIN_ALL + NO_CERTIFICATE),
    ('{a 443 ssl}', (1, 15, 9), False, PLAIN_ALL + NO_CERTIFICATE),
    ('{a 443 ssl}', (1, 15, 8), False, PLAIN_ALL),
    ('{a 443 ssl}', (1, 25, 1), False, PLAIN_ALL + (REJECT % '').replace(
        'tickets off;', 'tickets off;\n    http2 on;')),
    ('{a 443 ssl, [::]:443 ssl, [::]:80}', (1, 24, 0), True,
     CATCH_ALL % ('', V6 % '') + REJECT % '\n    listen [::]:443 ssl;')])
def test_the_catch_all_listens_where_the_apps_do(text, version, ipv6, expected):
    assert dh.render_catch_all(dh.servers_of(blocks(text)), version, ipv6) == expected

@pytest.mark.parametrize('version, text', [
    ((1, 24, 0), TOLD_ALL), ((1, 7, 5), TOLD_ALL), ((1, 7, 4), PLAIN_ALL)])
def test_the_catch_all_tells_this_server_from_others_where_nginx_can(version, text):
    assert dh.render_catch_all([], version, False, 'abcd1234') == text

def test_the_catch_all_lets_an_authority_ask_for_names_that_no_app_has_yet():
    text = dh.render_catch_all([], (1, 24, 0), False, has_challenges=True)
    assert text == PLAIN_ALL.replace('    return 404;\n', CHALLENGE_ALL)

@table('text, address', r'''
    {Blog.org 80}         => http://blog.org/
    {a.org 443 ssl}       => https://a.org/
    {a.org 8081}          => http://a.org:8081/
    {a.org 8443 ssl}      => https://a.org:8443/
    {a.org 127.0.0.1:81, 80} => http://a.org/
    {a.org 127.0.0.1:81}  => ports 25:25
    {_ 80 default_server} => http://192.0.2.2/
    {a 81}                => curl -H 'Host: a' http://192.0.2.2:81/
    {*.a}\n{b}            => curl -H 'Host: b' http://192.0.2.2/
    {~^w+$}               => ports 25:25
    {a unix:/x}           => ports 25:25
    {.a.org}              => http://a.org/
    {_}                   => ports 25:25''')
def test_the_address_is_what_a_person_would_type(text, address):
    job = '#\nexec docker run -p 25:25 a'
    made = release(job=job, proxy=blocks(text), **OF_A_JOB)
    assert dh.address_text(made, '192.0.2.2') == address

@table('domains, address', '''
    blog blog.*          => curl -H 'Host: blog' http://[::1]/
    blog blog.org *.org  => http://blog.org/
    www.blog.org blog.*  => http://www.blog.org/'''.replace('{HOST}', os.uname()[1]))
def test_the_address_is_one_that_may_lead_somewhere(domains, address):
    proxy = dh.render_proxy('blog', domains, (1, 24, 0), True)
    assert dh.address_text(release(proxy=proxy), '::1') == address

GENERATED = '''{table}{format}server {{
    listen 80{default};
{more}    server_name {names};
{log}    server_tokens off;
    client_max_body_size 100m;

    # The host that the request line names, if it does, and its port
    set $dockhand_port '';
    if ($http_host ~ "(:[0-9]+)$") {{ set $dockhand_port $1; }}
    if ($request ~* "^[^ ]+ [a-z]+://[^/? ]*?(:[0-9]+)?[/? ]") {{
        set $dockhand_port $1;
    }}
    set $dockhand_upgrade '';
    set $dockhand_connection '';
    if ($http_upgrade ~* "^websocket$") {{
        set $dockhand_upgrade websocket;
        set $dockhand_connection upgrade;
    }}

    # What this nginx sees of the client{or_a_front}
    set $dockhand_client $remote_addr;
    set $dockhand_way $remote_addr;
    set $dockhand_scheme $scheme;
{believed}
    proxy_http_version 1.1;
    proxy_set_header Host $host$dockhand_port;
    proxy_set_header X-Real-IP $dockhand_client;
    proxy_set_header X-Forwarded-For $dockhand_way;
    proxy_set_header X-Forwarded-Host $host$dockhand_port;
    proxy_set_header X-Forwarded-Proto $dockhand_scheme;
    proxy_set_header Upgrade $dockhand_upgrade;
    proxy_set_header Connection $dockhand_connection;

    # Other names under which apps look for the same, and httpoxy's
    proxy_set_header Forwarded '';
    proxy_set_header Front-End-Https '';
    proxy_set_header Proxy '';
    proxy_set_header X-Forwarded-Port '';
    proxy_set_header X-Forwarded-Protocol '';
    proxy_set_header X-Forwarded-Scheme '';
    proxy_set_header X-Forwarded-Ssl '';
    proxy_set_header X-Url-Scheme '';

    proxy_buffer_size 32k; proxy_buffers 8 8k; proxy_busy_buffers_size 32k;
    proxy_connect_timeout 5s; proxy_read_timeout 10m; proxy_send_timeout 10m;
    error_page 418 = @events;

    location / {{
        if ($http_accept ~* text/event-stream) {{ return 418; }}
        proxy_pass http://{app};
    }}
    # For events. What one location says does not hold in the other: say it above both
    location @events {{
        proxy_buffering off;
        proxy_pass http://{app};
    }}
}}
'''
SIX = '    listen [::]:80%s;\n'
LARGE = '    large_client_header_buffers 4 32k;\n'
MIN_TIMEOUT = '    keepalive_min_timeout 5s;\n'

BLOG_LOGGED = {
    'log': '    access_log /var/log/nginx/blog.log dockhand_blog;\n', 'format':
    "log_format dockhand_blog '$dockhand_client - $remote_user [$time_local] '\n"
    "    '\"$request\" $status $body_bytes_sent \"$http_referer\" "
    "\"$http_user_agent\" '\n    '$request_time $upstream_response_time';\n"}

def generated(app, names, more=LARGE, **changes):
    """What is made for an app without a front. more: lines of the server"""
    fields = dict.fromkeys(
        ['default', 'table', 'or_a_front', 'believed', 'log', 'format'], '')
    return GENERATED.format(app=app, names=names, more=more, **dict(fields, **changes))

@pytest.mark.parametrize('app, domains, version, ipv6, expected', [
    ('blog', 'blog blog.*', (1, 1, 19), False, generated('blog', 'blog blog.*', '')),
    ('blog', 'blog.org', (1, 4, 6), True, generated('blog', 'blog.org', SIX % '')),
    ('blog', 'a', (1, 14, 0), False, generated('blog', 'a', '')),
    ('blog', 'a', (1, 18, 0), False, generated('blog', 'a', '')),
    ('blog', 'a', (1, 19, 2), False, generated('blog', 'a')),
    ('blog', 'blog blog.*', (1, 22, 1), False, generated('blog', 'blog blog.*')),
    ('my-app.x_y', 'a.org *.b.org', (1, 24, 0), True, generated(
        'my-app.x_y', 'a.org *.b.org', SIX % '' + LARGE)),
    ('blog', '_', (1, 26, 0), False, generated('blog', '_', default=' default_server')),
    ('blog', 'a.org _', (1, 27, 3), True, generated(
        'blog', 'a.org _', SIX % ' default_server' + LARGE, default=' default_server')),
    ('blog', 'a', (1, 27, 4), False, generated('blog', 'a', MIN_TIMEOUT + LARGE)),
    ('blog', 'a', (1, 29, 7), True, generated(
        'blog', 'a', SIX % '' + MIN_TIMEOUT + LARGE))])
def test_a_proxy_file_is_made_for_this_nginx_and_this_host(
        app, domains, version, ipv6, expected):
    text = dh.render_proxy(app, domains, version, ipv6)
    assert text == expected
    server, = dh.servers_of(text)
    assert server.names == domains.split() and len(server.listens) == 1 + ipv6
    dh.check_proxy([server], {})

BELIEVED = r'''    if ($TABLE) { set $dockhand_way $proxy_add_x_forwarded_for; }
    if ($dockhand_way ~* "(?:^|, ?)\[?([0-9a-f]*:[0-9a-f:.]+|[0-9]+(?:\.[0-9]+){3})\]?(?::[0-9]+)?, [^, ]+$") { set $dockhand_client $1; }
    set $dockhand_said "$TABLE $http_x_forwarded_proto";
    if ($dockhand_said ~* "^1 http$") { set $dockhand_scheme http; }
    if ($dockhand_said ~* "^1 https$") { set $dockhand_scheme https; }
'''

@pytest.mark.parametrize('version, trust, table, lines', [
    ((1, 1, 19), '10.0.0.0/8 ::1', 'dockhand_front_7b094b78418c', ['10.0.0.0/8']),
    ((1, 4, 6), '10.0.0.0/8 ::1', 'dockhand_front_ac78e4d475a6', ['10.0.0.0/8', '::1']),
    ((1, 22, 1), '::1 10.0.0.0/8 ::1', 'dockhand_front_ac78e4d475a6',
     ['10.0.0.0/8', '::1'])])
def test_a_front_is_known_by_a_table_that_no_other_file_has_with_other_lines(
        version, trust, table, lines):
    geo = 'geo $%s {\n    default 0;\n%s}\n' % (
        table, ''.join('    %s 1;\n' % line for line in lines))
    text = dh.render_proxy('blog', 'a', version, False, trust)
    assert text == generated(
        'blog', 'a', LARGE if version > (1, 19) else '', table=geo,
        or_a_front=', or what a front says that config trusts',
        believed=BELIEVED.replace('TABLE', table))
    assert dh.read_proxy_file(text).troubles == []
    assert len(table) <= 46             # what nginx's hash of variables takes

@each('domains', 'blog _')
@pytest.mark.parametrize('trust', ['', '10.0.0.0/8 2001:db8::/32'])
def test_a_file_that_was_made_may_be_pushed_as_an_apps_own(domains, trust):
    text = dh.render_proxy('shop', domains, MODERN, True, trust)
    assert problems(text) == [] == problems(text, text)

UPSTREAM = '''# dockhand: where requests go
upstream blog {
    server 10.86.0.2:8000;
    keepalive 64;
%s}
'''

@pytest.mark.parametrize('version, more', [
    ((1, 4, 6), ''), ((1, 15, 2), ''), ((1, 15, 3), '    keepalive_timeout 1s;\n'),
    ((1, 31, 0), '    keepalive_timeout 1s;\n')])
def test_an_upstream_leads_to_the_container_and_keeps_connections(version, more):
    text = dh.upstream('blog', [('10.86.0.2', 8000)], version)
    assert text == UPSTREAM % more
    made = 'keepalive_min_timeout 5s;\n    keepalive 1;\n'
    assert dh.with_backup(made + text, [('10.86.0.9', 90)]) == made + text.replace(
        '8000;\n', '8000;\n    server 10.86.0.9:90 backup;\n')

# ---- Proxy files that are made, asked through nginx ------------------------------------

# This machine's own nginx passes requests to an app here, which keeps what it was told.

@contextmanager
def before_an_app(tmpdir, told, domains='blog blog.*', edit=None, **config):
    """nginx with the file that is made for the app that is told. edit: what makes another
    text of it, for a version of nginx"""
    demand_nginx()
    nginx = Host('/').nginx
    text = dh.render_proxy('blog', domains, nginx.version(), False, **config)
    text += dh.upstream('blog', [('127.0.0.1', told.port)], nginx.version())
    if edit is not None:
        text = edit(text, nginx.version())
    assert dh.read_proxy_file(text).troubles == []
    with Alone(tmpdir, {'blog': text}) as alone:
        yield alone

def fields_of(head):
    """{name in lower case: value} of what a request says."""
    lines = head.partition('\r\n\r\n')[0].split('\r\n')[1:]
    return dict((name.lower(), value.strip())
                for name, _, value in [line.partition(':') for line in lines])

def arrived(tmpdir, told, lines, **config):
    """What the app is told of a request."""
    with before_an_app(tmpdir, told, **config) as alone:
        answer = alone.ask(*lines)
        assert answer.startswith('HTTP/1.1 200 '), answer
    return fields_of(told.heads[-1])

BLOG = 'Host: blog'

@table('accept', """
    text/event-stream
    Text/Event-Stream
    text/html, text/event-stream;q=0.9""")
def test_nginx_passes_an_event_on_at_once_to_whom_asks_for_events(tmpdir, told, accept):
    with before_an_app(tmpdir, told) as alone:
        with closing(alone.connect('GET /events HTTP/1.1', BLOG,
                                   'Accept: ' + accept)) as connection:
            connection.settimeout(3)
            heard = b''
            while b'data: 1' not in heard:
                heard += connection.recv(65536)
        assert heard.startswith(b'HTTP/1.1 200 ')

@pytest.mark.parametrize('accept, frees', [
    ('*/*', True), ('text/html', True), ('text/event-stream', False)])
def test_nginx_takes_an_answer_off_the_app_while_its_reader_is_slow(
        tmpdir, told, accept, frees):
    with before_an_app(tmpdir, told) as alone:
        with closing(alone.connect('GET /large HTTP/1.1', BLOG, 'Accept: ' + accept)):
            told.written.wait(5 if frees else 1)
            assert told.written.is_set() == frees

def test_a_body_reaches_the_app_that_is_asked_for_events(tmpdir, told):
    with before_an_app(tmpdir, told) as alone:
        assert alone.ask('GET /teapot HTTP/1.1', BLOG).startswith('HTTP/1.1 418 Teapot')
        assert alone.ask('POST / HTTP/1.1', BLOG, 'Accept: text/event-stream',
                         'Content-Length: 4', body='body').startswith('HTTP/1.1 200 OK')
    assert told.heads[-1].startswith('POST / HTTP/1.1\r\n')
    assert told.heads[-1].endswith('\r\n\r\nbody')

@pytest.mark.parametrize('size', [4200, 32000])
def test_nginx_passes_headers_of_32_kb_on_in_both_directions(tmpdir, told, size):
    """In one line of a request before 1.19.2 as many as nginx itself takes."""
    with before_an_app(tmpdir, told) as alone:
        answer = alone.ask('GET /header/%d HTTP/1.1' % size, BLOG)
        assert answer.startswith('HTTP/1.1 200 ') and 'x' * size in answer
        line = size if Host('/').nginx.version() >= (1, 19, 2) else min(size, 8000)
        answer = alone.ask('GET / HTTP/1.1', BLOG, 'Cookie: ' + 'y' * line)
        assert answer.startswith('HTTP/1.1 200 '), answer
    assert 'y' * line in told.heads[-1]

@table('line, host, wanted', """
    /               => blog          => blog
    /               => Blog:8080     => blog:8080
    http://a/       => blog          => a
    http://A:81/x   => blog:8080     => a:81
    http://a/       => blog:8080     => a
    http://a/?b:9/  => blog          => a
    HTTP://a        => blog          => a
    /http://b:9/    => blog          => blog
    /               => [::1]:81      => [::1]:81
    /               => [::1]         => [::1]""")
def test_nginx_names_the_host_that_the_request_line_names(
        tmpdir, told, line, host, wanted):
    lines = ['GET %s HTTP/1.1' % line, 'Host: ' + host]
    fields = arrived(tmpdir, told, lines, domains='_')
    assert fields['host'] == fields['x-forwarded-host'] == wanted

@table('upgrade, passed', """
    websocket      => websocket
    WebSocket      => websocket
    h2c            =>
    websocket, h2c =>
    x-websocket    =>""")
def test_nginx_passes_an_upgrade_to_websocket_on_and_no_other(
        tmpdir, told, upgrade, passed):
    fields = arrived(tmpdir, told, ['GET / HTTP/1.1', BLOG, 'Upgrade: ' + upgrade])
    assert fields.get('upgrade', '') == passed
    assert fields.get('connection', '') == ('upgrade' if passed else '')

FORGED = ['X-Real-IP: 6.6.6.6', 'X-Forwarded-For: 6.6.6.6', 'X-Forwarded-Host: evil',
          'X-Forwarded-Port: 66', 'X-Forwarded-Ssl: on', 'X-Forwarded-Proto: https',
          'X-Forwarded-Scheme: https', 'X-Forwarded-Protocol: ssl',
          'X-Url-Scheme: https', 'Front-End-Https: on', 'Forwarded: for=6.6.6.6',
          'Proxy: http://evil/', 'X_Forwarded_Proto: https']

@pytest.mark.parametrize('config, client, scheme', [
    ({}, '127.0.0.1', 'http'),
    ({'trust': '192.0.2.0/24 2001:db8::/32'}, '127.0.0.1', 'http')])
def test_nginx_tells_the_app_what_it_sees_and_not_what_a_stranger_says(
        tmpdir, told, config, client, scheme):
    fields = arrived(tmpdir, told, ['GET / HTTP/1.1', BLOG] + FORGED, **config)
    assert fields == {
        'host': 'blog', 'x-real-ip': client, 'x-forwarded-for': client,
        'x-forwarded-host': 'blog', 'x-forwarded-proto': scheme}

@table('trust, said, client', """
    127.0.0.1      => 9.9.9.9          => 9.9.9.9
    127.0.0.0/8    => 1.1.1.1, 9.9.9.9 => 9.9.9.9
    ::1 127.0.0.1  => 2001:db8::1      => 2001:db8::1
    0.0.0.0/0      => 9.9.9.9, unknown => 127.0.0.1""")
def test_nginx_takes_the_client_from_a_front_that_config_names(
        tmpdir, told, trust, said, client):
    lines = ['GET / HTTP/1.1', BLOG, 'X-Forwarded-For: ' + said]
    fields = arrived(tmpdir, told, lines, trust=trust)
    assert fields['x-real-ip'] == client
    assert fields['x-forwarded-for'] == said + ', 127.0.0.1'
    assert fields['x-forwarded-proto'] == 'http'

@table('trust, said, scheme', """
    127.0.0.1  => https       => https
    ::/0 0.0.0.0/0 => https   => https
    127.0.0.1  => http        => http
    127.0.0.1  => "evil"      => http
    127.0.0.1  => https, http => http
    10.0.0.0/8 => https       => http""")
def test_nginx_takes_the_scheme_from_a_front_that_config_names(
        tmpdir, told, trust, said, scheme):
    lines = ['GET / HTTP/1.1', BLOG, 'X-Forwarded-Proto: ' + said]
    fields = arrived(tmpdir, told, lines, trust=trust)
    assert fields['x-forwarded-proto'] == scheme
    assert fields['x-real-ip'] == fields['x-forwarded-for'] == '127.0.0.1'

def test_nginx_answers_503_with_a_time_to_try_again_for_a_stopped_app(tmpdir, told):
    with before_an_app(tmpdir, told, edit=dh.closed_proxy) as alone:
        for line in ('GET / HTTP/1.1', 'GET /a/b?c HTTP/1.1', 'POST /x HTTP/1.1'):
            answer = alone.ask(line, BLOG)
            assert answer.startswith('HTTP/1.1 503 '), answer
            has_time = '\r\nRetry-After: 60\r\n' in answer
            assert has_time == (Host('/').nginx.version() >= (1, 7, 5))
    assert told.heads == []

def test_nginx_keeps_the_fronts_of_two_apps_apart(tmpdir, told):
    """Their files share the names of variables; two that say the same may share one."""
    demand_nginx()
    version = Host('/').nginx.version()
    trusted = {'blog': '127.0.0.1', 'shop': '10.0.0.0/8', 'wiki': '127.0.0.1'}
    files = {}
    for name in trusted:
        files[name] = dh.render_proxy(name, name, version, False, trusted[name])
        files[name] += dh.upstream(name, [('127.0.0.1', told.port)], version)
    schemes = {}
    with Alone(tmpdir, files) as alone:
        for name in trusted:
            said = functools.partial(alone.ask, 'GET / HTTP/1.1', 'Host: ' + name,
                                     'X-Forwarded-Proto: https')
            assert until(lambda: ' 200 ' in said()[:16], True)
            schemes[name] = fields_of(told.heads[-1])['x-forwarded-proto']
    assert schemes == {'blog': 'https', 'shop': 'http', 'wiki': 'https'}

def test_nginx_says_nothing_of_its_version(tmpdir, told):
    with before_an_app(tmpdir, told) as alone:
        answers = [alone.ask('GET / HTTP/1.1', BLOG),
                   alone.ask('GET / HTTP/1.1', BLOG, 'Cookie: ' + 'x' * 60000)]
    assert answers[0].startswith('HTTP/1.1 200 ') and ' 400 ' in answers[1][:20]
    assert not re.search(r'nginx/\d', str(answers))

# ---- Https: what nginx gets, and what openssl and certbot print ------------------------

CERTIFICATES = '/var/lib/dockhand/certificates'
CIPHERS = ('ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:'
           'ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384:'
           'ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305')

# A file of two servers, on lines of their own and on one, and what https makes of it: a
# name has a certificate, one has none, and the second server wants a password.
SHOP = '''upstream shop { server 10.86.0.2:80; }
server {
    listen 80;%s
    # the names
    server_name shop.test dead.test;
    location / { proxy_pass http://shop; }
}
server { listen 80; server_name www.shop.test; auth_request /a; return 301 /; }
'''
SHOP_HTTPS = '''upstream shop { server 10.86.0.2:80; }
server {
    # dockhand: https, from here
    if ($uri ~ "^/\\.well-known/acme-challenge/") { break; }
    location ^~ /.well-known/acme-challenge/ {
        root /var/lib/dockhand/acme;
        auth_basic off; allow all; default_type text/plain;
    }
    set $dockhand_plain "$http_x_forwarded_proto|$host$uri";
    if ($dockhand_plain ~* "^\\|(shop\\.test)/(?!\\.well-known/acme-challenge/)") {
        return 301 https://$host$request_uri;
    }
    # dockhand: https, to here
    listen 80;%(six)s
    # the names
    server_name shop.test dead.test;
    location / { proxy_pass http://shop; }
}
# dockhand: https, from here
server {
    %(listen)s
    server_name shop.test;
    ssl_certificate /var/lib/dockhand/certificates/shop.test.pem;
    ssl_certificate_key /var/lib/dockhand/certificates/shop.test.pem;
    ssl_protocols %(protocols)s;
    ssl_ciphers %(ciphers)s;
    ssl_prefer_server_ciphers off;
    ssl_session_cache shared:dockhand:10m;
    ssl_session_timeout 1d;
%(more)s    if ($uri ~ "^/\\.well-known/acme-challenge/") { break; }
    location ^~ /.well-known/acme-challenge/ {
        root /var/lib/dockhand/acme;
        auth_basic off; allow all; default_type text/plain;
    }
    # the names
    location / { proxy_pass http://shop; }
}
# dockhand: https, to here
server { # dockhand: https, from here
    if ($uri ~ "^/\\.well-known/acme-challenge/") { break; }
    location ^~ /.well-known/acme-challenge/ {
        root /var/lib/dockhand/acme;
        auth_basic off; allow all; default_type text/plain;
        auth_request off;
    }
    # dockhand: https, to here
 listen 80; server_name www.shop.test; auth_request /a; return 301 /; }
'''
NO_TICKETS = '    ssl_session_tickets off;\n'
BOTH_PROTOCOLS = 'TLSv1.2 TLSv1.3'

def certificate(name, *names):
    return dh.Certificate('%s/%s.pem' % (CERTIFICATES, name), list(names or [name]))

@pytest.mark.parametrize('version, listen, protocols, more', [
    ((1, 1, 19), '443 ssl', 'TLSv1.2', ''),
    ((1, 4, 6), '443 ssl', 'TLSv1.2', ''),
    ((1, 9, 4), '443 ssl', 'TLSv1.2', NO_TICKETS),
    ((1, 9, 5), '443 ssl http2', 'TLSv1.2', NO_TICKETS),
    ((1, 14, 0), '443 ssl http2', BOTH_PROTOCOLS, NO_TICKETS),
    ((1, 18, 0), '443 ssl http2', BOTH_PROTOCOLS, NO_TICKETS),
    ((1, 22, 1), '443 ssl http2', BOTH_PROTOCOLS, NO_TICKETS),
    ((1, 25, 0), '443 ssl http2', BOTH_PROTOCOLS, NO_TICKETS),
    ((1, 25, 1), '443 ssl', BOTH_PROTOCOLS, NO_TICKETS + '    http2 on;\n'),
    ((1, 26, 2), '443 ssl', BOTH_PROTOCOLS, NO_TICKETS + '    http2 on;\n'),
    ((1, 29, 8), '443 ssl', BOTH_PROTOCOLS, NO_TICKETS + '    http2 on;\n')])
@pytest.mark.parametrize('six', ['', '\n    listen [::]:80;'])
def test_what_https_adds_to_a_proxy_file_is_what_its_nginx_takes(
        version, listen, protocols, more, six):
    listens = 'listen %s;' % listen
    if six and version >= (1, 3, 4):
        listens += '\n    listen [::]:%s;' % listen
    text = SHOP % six
    made = dh.with_https(text, [certificate('shop.test')], version)
    assert made == SHOP_HTTPS % {
        'six': six, 'listen': listens, 'protocols': protocols, 'more': more,
        'ciphers': CIPHERS}
    assert dh.without_https(made) == text

@pytest.mark.parametrize('text', [
    SHOP % '', 'server { server_name a.test; }', 'server{server_name a.test;}server{}',
    '# x\nserver\n{\nlisten 80;server_name a.test;}\n\n', 'server { listen 443 ssl; }',
    'server {\n\n    server_name a.test;\n\n\n    return 200 "a\n\nb";\n}\n# end',
    'server {\n    server_name a.test;   \n    listen 80; # plain\n}   \n',
    '"server" # {\n{ server_name "a.test" b.test; }',
    dh.render_proxy('a', 'a.test', (1, 24, 0), True, '10.0.0.0/8'),
    dh.closed_proxy(dh.render_proxy('a', 'a.test', (1, 24, 0), True), (1, 24, 0))])
def test_what_https_adds_can_be_taken_out_again(text):
    made = dh.with_https(text, [certificate('a.test')], (1, 24, 0))
    assert dh.without_https(made) == text
    assert dh.without_https(text) == text
    assert dh.NginxReader(made).troubles == []

@table('servers, names', r'''
    shop.test www.shop.test       => shop.test www.shop.test
    hello hello.*                 =>
    _ 80 default                  =>
    ~^a.test$ *.test b.test       => b.test
    a.test @80 @8080              =>
    a.test @443 / a.test / b.test => b.test
    a.test / a.test @[::]:443     =>
    a.test @80 / a.test b.test    => a.test b.test
    a.test @192.0.2.7:80 / b.test => b.test
    a.test @80 @[::]:80           => a.test
    A.test                        => a.test''')
def test_the_names_that_get_https_are_full_and_listen_on_port_80_alone(servers, names):
    text = ''
    for server in servers.split('/'):
        words = server.split()
        listens = ''.join('listen %s; ' % word[1:] for word in words if word[0] == '@')
        words = [word for word in words if word[0] != '@']
        text += 'server { %sserver_name %s; }\n' % (listens, ' '.join(words))
    assert dh.names_for_https(text) == names.split()

@table('listen, names, left', r'''
    443 ssl                => a.test          => x.a.test b.test
    443 ssl                => *.a.test        => a.test b.test
    443 ssl                => .a.test         => b.test
    443 ssl                => b.*             => a.test x.a.test
    443 ssl                => ~^[a-z][.]a[.]te => a.test b.test
    443 ssl                => ~^c             => a.test x.a.test b.test
    443 ssl default_server => _               =>
    [::]:443 ssl default   => c.test          =>
    8443 ssl               => *.a.test        => a.test x.a.test b.test''')
def test_a_name_that_a_file_serves_on_443_itself_in_any_way_is_left_alone(
        listen, names, left):
    text = ('server { listen 80; server_name a.test x.a.test b.test; }\n'
            'server { listen %s; server_name %s; }\n' % (listen, names))
    assert dh.names_for_https(text) == left.split()

@table('name, is_full', '''
    a.test          => yes
    a-b.c.test      => yes
    xn--bcher-kva.x => yes
    a               =>
    localhost       =>
    192.0.2.7       =>
    a..test         =>
    .test           =>
    a.test.         =>
    -a.test         =>
    a-.test         =>
    a_b.test        =>
    *.test          =>
    ~a.test         =>
    ../a.test       =>''')
def test_a_name_that_an_authority_certifies_is_full(name, is_full):
    assert dh.is_full_name(name) == bool(is_full)
    assert not dh.is_full_name('a' * 64 + '.test')
    assert not dh.is_full_name('.'.join(['a' * 60] * 5))

@table('name, certified, is_good', '''
    a.test    => a.test        => yes
    a.test    => b.test        =>
    a.x.test  => *.x.test      => yes
    b.a.x.test => *.x.test     =>
    x.test    => *.x.test      =>
    *.x.test  => *.x.test      => yes
    *.y.x.test => *.x.test     =>
    x.test    => *.x.test x.test => yes
    ~^a.test  => *.test        =>''')
def test_a_wildcard_is_good_for_one_label(name, certified, is_good):
    assert dh.is_covered_by(name, certified.split()) == bool(is_good)

def test_the_certificate_that_somebody_brought_wins():
    own = certificate('own/blog', '*.a.test', 'x.test')
    uses = dh.uses_of(['a.test', 'b.a.test', 'x.test', 'c.test'],
                      [own, certificate('a.test'), certificate('x.test')])
    assert uses == [(own, ['b.a.test', 'x.test']), (certificate('a.test'), ['a.test'])]
    assert dh.uses_of(['a.test', 'a.test'], [certificate('a.test')]) == [
        (certificate('a.test'), ['a.test'])]

def test_a_place_for_challenges_that_a_file_brings_is_left_alone():
    text = 'server {\n    listen 80;\n    server_name a.test;\n    location %s { x; }\n}\n'
    for place in ('/.well-known/acme-challenge/', '= /.well-known/acme-challenge/x',
                  r'~ ^/\.well-known/acme-challenge/'):
        made = dh.with_https(text % place, [certificate('a.test')], (1, 24, 0))
        assert made.count('acme-challenge/ {') + made.count('break') <= 2
        assert 'root /var' not in made and made.count('return 301') == 1

def test_what_a_server_says_of_tls_itself_is_not_said_twice():
    text = ('server {\n    server_name a.test;\n    ssl_protocols TLSv1.3;\n'
            '    ssl_certificate /x; ssl_certificate_key /x;\n    http2 off;\n}\n')
    made = dh.with_https(text, [certificate('a.test')], (1, 26, 0))
    twin = dh.server_blocks(dh.NginxReader(made).directives)[1]
    words = [directive.words[0] for directive in twin.inside]
    assert sorted(set(words)) == sorted(words) and '/x' not in made.partition('}\n#')[2]

@pytest.mark.parametrize('said, in_twin', [
    ('return 301 $scheme://$server_name$request_uri;',
     'return 301 $scheme://a.test$request_uri;'),
    ('set $x "${server_name}/$server_name_x";', 'set $x "a.test/$server_name_x";'),
    ('if ($host != $server_name) { return 404; }', 'if ($host != a.test) { return 404; }')])
def test_the_name_of_a_server_is_its_first_one_by_https_too(said, in_twin):
    text = 'server { server_name A.test b.test; %s }\n' % said
    made = dh.with_https(text, [certificate('a.test'), certificate('b.test')], (1, 24, 0))
    servers = made.split('server {')[2:]
    assert [said in server for server in servers] == [True, False]
    assert in_twin in servers[1] and dh.without_https(made) == text
    text = text.replace('A.test', '*.a.test')
    assert said in dh.with_https(text, [certificate('b.test')], (1, 24, 0)).split('443')[1]

def test_many_names_are_sent_to_https_in_words_that_nginx_takes():
    names = ['%s%d.test' % ('a' * 50, at) for at in range(150)]
    text = 'server {\n    server_name %s;\n}\n' % '\n'.join(names)
    made = dh.with_https(text, [certificate(name) for name in names], (1, 24, 0))
    assert max(map(len, re.findall('"[^"]*"', made))) < 1000
    assert made.count('return 301') == 15 and made.count('listen 443') == 150

@pytest.mark.parametrize('mark', [dh.HTTPS_BEGIN, dh.HTTPS_END])
def test_a_pushed_file_brings_no_marks_of_https_but_in_pairs(plain, mark):
    plain.lives(an_app('one', proxy=WEB))
    assert refusal(plain.push, an_app('two', proxy=WEB + mark)) == (
        'nginx-proxy.conf: leave out the line `%s`, which is for what dockhand adds'
        % mark.strip())
    copied = WEB + dh.HTTPS_BEGIN + 'server { listen 443; }\n' + dh.HTTPS_END
    plain.push(an_app('two', proxy=copied))
    assert plain.app.live().proxy.partition(dh.MARK)[0] == PROXY_HEADER + WEB

CERTBOT_SAYS = [
    ('''Requesting a certificate for nodns.test

Certbot failed to authenticate some domains (authenticator: webroot). The Certificate \
Authority reported these problems:
  Domain: nodns.test
  Type:   connection
  Detail: Get "http://nodns.test:80/.well-known/acme-challenge/5tCHySyND-K_q": could not \
resolve

Hint: The Certificate Authority failed to download the temporary challenge files.

Saving debug log to /var/log/letsencrypt/letsencrypt.log
Some challenges have failed.
Ask for help or search for solutions at https://community.example. See the logfile
''', 'Get "http://nodns.test:80/.well-known/acme-challenge/...": could not resolve'),
    ('''IMPORTANT NOTES:
 - The following errors were reported by the server:

   Domain: a.test
   Type:   dns
   Detail: DNS problem: NXDOMAIN looking up A for a.test - check that
   a DNS record exists for this domain

 - Your account credentials have been saved
''', 'DNS problem: NXDOMAIN looking up A for a.test - check that a DNS record exists for '
     'this domain'),
    ('''Saving debug log to /x
An unexpected error occurred:
ValueError: Requesting localhost/dir: Connection refused
Ask for help or search for solutions
''', 'certbot: Requesting localhost/dir: Connection refused'),
    ('An unexpected error occurred:\nrequests.exceptions.ConnectionError: x: away\n',
     'certbot: x: away'),
    ('An unexpected error occurred:\n', 'certbot: An unexpected error occurred:'),
    ('live directory exists for x-e.test\nAsk for help\n',
     'certbot: live directory exists for x-e.test'),
    ('Unable to find deploy-hook command x in the PATH.\n(PATH is /usr/bin:/bin)\n',
     'certbot: Unable to find deploy-hook command x in the PATH.'),
    ('', 'certbot: it says nothing'),
    ('Saving debug log to /x\n', 'certbot: it says nothing')]

@pytest.mark.parametrize('said, reason', CERTBOT_SAYS)
def test_the_reason_of_certbot_is_found_in_what_it_says(said, reason):
    assert dh.certbot_reason(said) == reason

LOG_OF_CERTBOT = '''2026-11-29 01:14:40:DEBUG:x:Notifying user: Renewing an existing \
certificate for a.test
2026-11-29 01:14:47:DEBUG:x:Notifying user: Renewing an existing certificate for b.test
2026-11-29 01:14:48:INFO:x:Challenge failed for domain b.test
  Domain: b.test
  Detail: Get "http://b.test:80/.well-known/acme-challenge/xy": connection refused

2026-11-29 01:14:48:ERROR:x:Failed to renew certificate dockhand-b.test with error: \
Some challenges have failed.
2026-11-29 01:14:49:DEBUG:x:Notifying user: Renewing an existing certificate for c.test
2026-11-29 01:14:50:ERROR:x:Failed to renew certificate dockhand-c.test with error: \
Connection refused
'''

@table('name, reason', '''
    a.test =>
    b.test => Get "http://b.test:80/.well-known/acme-challenge/...": connection refused
    c.test => Connection refused''')
def test_why_a_certificate_was_not_renewed_stands_in_the_log_of_certbot(name, reason):
    assert dh.renewal_reason(LOG_OF_CERTBOT, 'dockhand-' + name) == reason

@table('issuer, name', r'''
    C = US, O = Let's Encrypt, CN = R11  => R11
    /C=US/O=Let's Encrypt/CN=R3          => R3
    C=US, O=Let's Encrypt, CN=E5         => E5
    CN = Pebble Intermediate CA 7a3013   => Pebble Intermediate CA 7a3013
    O = Acme                             => Acme
    C = US                               => somebody without a name''')
def test_a_certificate_is_read_as_each_openssl_prints_it(issuer, name):
    said = ('issuer=%s\nnotBefore=Nov  1 00:00:00 2026 GMT\n'
            'notAfter=Dec 31 23:59:59 2026 GMT\nCertificate:\n'
            '            X509v3 Subject Alternative Name: critical\n'
            '                DNS:A.test, DNS:*.b.test, IP Address:192.0.2.7\n' % issuer)
    assert dh.read_x509(said) == dh.X509(['a.test', '*.b.test'], name, 1793491200,
                                         1798761599)
    assert dh.read_x509('unable to load certificate\n') is None
    assert dh.read_x509(said.replace('Alternative', '')).names == []

CHAIN = ('-----BEGIN CERTIFICATE-----\nA\n-----END CERTIFICATE-----',
       '-----BEGIN CERTIFICATE-----\nB\n-----END CERTIFICATE-----',
       '-----BEGIN EC PRIVATE KEY-----\nC\n-----END EC PRIVATE KEY-----')

def test_a_chain_and_its_key_are_put_in_the_order_that_nginx_wants():
    wanted = '\n'.join(CHAIN) + '\n'
    parameters = '-----BEGIN EC PARAMETERS-----\nD\n-----END EC PARAMETERS-----'
    for given in (CHAIN, CHAIN[2:] + CHAIN[:2], ('Bag\n',) + CHAIN, (parameters,) + CHAIN):
        assert dh.ordered_pem('\r\n'.join(given)) == wanted

@pytest.mark.parametrize('given, said', [
    ('', 'are wanted'), (CHAIN[0], 'are wanted'), (CHAIN[2], 'are wanted'),
    ('\n'.join(CHAIN + CHAIN[2:]), 'are wanted'), ('\n'.join(CHAIN)[:-5], 'are wanted'),
    ('\n'.join(CHAIN).replace('EC PRIVATE', 'ENCRYPTED PRIVATE'), 'a passphrase'),
    ('\n'.join(CHAIN).replace('\nC', '\nProc-Type: 4,ENCRYPTED\nC'), 'a passphrase'),
    ('\n'.join(CHAIN).replace('PRIVATE', 'PUBLIC'), 'are wanted')])
def test_what_is_no_certificate_with_its_key_is_refused(given, said):
    assert said in refusal(dh.ordered_pem, given)

@pytest.mark.parametrize('line', [
    '-----BEGIN CERTIFICATE-----\n', '-----END CERTIFICATE-----\n', dh.HTTPS_BEGIN,
    dh.HTTPS_END, 'server {\n', 'Detail: x\n', 'An unexpected error occurred:\n',
    'Failed to renew certificate dockhand-a.test with error: ', 'server_name a.test;'])
def test_what_https_reads_is_read_in_one_pass(line):
    text = line * (dh.FILE_LIMIT // len(line))
    with ending():
        dh.pem_blocks(text)
        dh.certbot_reason(text)
        dh.renewal_reason(text, 'dockhand-a.test')
        dh.without_https(text)
        dh.with_https(text, [certificate('a.test')], (1, 24, 0))
        dh.read_x509(text)

# ---- Https: what this machine's nginx makes of it --------------------------------------

def self_signed(folder, names):
    """The path of a certificate for these names, with its key."""
    demand_tool('openssl')
    path = str(folder.join(names[0] + '.pem'))
    subprocess.check_call(
        ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '90',
         '-subj', '/CN=x', '-addext', 'subjectAltName=DNS:' + ',DNS:'.join(names),
         '-keyout', path + '.key', '-out', path], stderr=subprocess.PIPE)
    with open(path, 'a') as target:
        target.write(dh.read_file(path + '.key'))
    return path

@contextmanager
def behind_https(tmpdir, text, *names):
    """nginx with a proxy file that has https for these names, and our catch-all. In the
    folder `acme` is what an authority may ask for."""
    demand_nginx()
    version = Host('/').nginx.version()
    path = self_signed(tmpdir.mkdir('pem'), names)
    made = dh.with_https(text, [dh.Certificate(path, names)], version)
    catch_all = dh.render_catch_all(dh.servers_of(made), version, False, 'abcd1234', True)
    tmpdir.mkdir('acme').mkdir('.well-known').mkdir('acme-challenge').join('x').write('yes')
    os.chmod(str(tmpdir), 0o755)
    files = {'000-dockhand': catch_all, 'a': made}
    for name in files:
        files[name] = files[name].replace(dh.CHALLENGES, str(tmpdir.join('acme')))
    with Alone(tmpdir, files) as alone:
        yield alone

CHALLENGE = 'GET /.well-known/acme-challenge/x HTTP/1.1'
A_TEST = 'Host: a.test'
GUARDED = '''server {
    listen 80 default_server;
    server_name a.test b.test;
    auth_basic "Members only"; auth_basic_user_file /dev/null;
    deny all;
    location / { root /nowhere; }
    location ~ /\\. { return 403; }
}
server {
    listen 80;
    server_name c.test;
    return 301 $scheme://a.test$request_uri;
}
'''

def test_nginx_lets_an_authority_in_whatever_else_a_file_says(tmpdir):
    with behind_https(tmpdir, GUARDED, 'a.test', 'c.test') as alone:
        for name in ('a.test', 'b.test', 'c.test', 'nobody.test'):
            assert alone.ask(CHALLENGE, 'Host: ' + name).endswith('\r\n\r\nyes')
        for name in ('a.test', 'c.test'):
            answer = alone.ask_tls(name, CHALLENGE, 'Host: ' + name)
            assert answer.endswith('\r\n\r\nyes')
        assert ' 403 ' in alone.ask('GET / HTTP/1.1', 'Host: b.test')[:15]
        assert ' 403 ' in alone.ask_tls('a.test', 'GET / HTTP/1.1', A_TEST)[:15]
        answer = alone.ask_tls('c.test', 'GET /x?y HTTP/1.1', 'Host: c.test')
        assert '\r\nLocation: https://a.test/x?y\r\n' in answer

def test_nginx_sends_to_https_who_asked_by_http_for_a_name_that_has_it(tmpdir, told):
    version = Host('/').nginx.version()
    text = dh.render_proxy('a', 'a.test b.test', version, False)
    text += dh.upstream('a', [('127.0.0.1', told.port)], version)
    with behind_https(tmpdir, text, 'a.test') as alone:
        for host in ('a.test', 'A.TEST', 'a.test:80'):
            answer = alone.ask('GET /x%20y?z HTTP/1.1', 'Host: ' + host)
            assert answer.startswith('HTTP/1.1 301 ')
            assert '\r\nLocation: https://a.test/x%20y?z\r\n' in answer
        answer = alone.ask('GET %s HTTP/1.1' % dh.TOKEN_PATH, A_TEST)
        assert ' 301 ' in answer[:15] and '\r\nX-Dockhand: abcd1234\r\n' in answer
        assert told.heads == []
        assert ' 200 ' in alone.ask('GET / HTTP/1.1', 'Host: b.test')[:15]
        for said in ('https', 'http', 'x|a.test/'):
            answer = alone.ask('GET / HTTP/1.1', A_TEST, 'X-Forwarded-Proto: ' + said)
            assert ' 200 ' in answer[:15]
        assert ' 200 ' in alone.ask_tls('a.test', 'GET / HTTP/1.1', A_TEST)[:15]
        assert fields_of(told.heads[-1])['x-forwarded-proto'] == 'https'

def test_nginx_sends_to_the_first_name_by_https_as_by_http(tmpdir):
    text = ('server {\n    listen 80; server_name a.test b.test;\n'
            '    if ($host != $server_name) { return 301 '
            '$scheme://$server_name$request_uri; }\n    return 200 $server_name;\n}\n')
    demand_nginx()
    folder = tmpdir.mkdir('other')
    certificates = [dh.Certificate(self_signed(folder, [name]), [name])
                    for name in ('a.test', 'b.test')]
    made = dh.with_https(text, certificates, Host('/').nginx.version())
    os.chmod(str(tmpdir), 0o755)
    with Alone(tmpdir, {'a': made}) as alone:
        answer = alone.ask_tls('b.test', 'GET /x HTTP/1.1', 'Host: b.test')
        assert '\r\nLocation: https://a.test/x\r\n' in answer
        assert alone.ask_tls('a.test', 'GET / HTTP/1.1', A_TEST).endswith('a.test')

def test_nginx_shows_nobodys_certificate_for_an_unknown_name(tmpdir):
    demand_nginx()
    if Host('/').nginx.version() < (1, 15, 9):
        pytest.skip('this nginx has to show one')
    with behind_https(tmpdir, GUARDED, 'a.test') as alone:
        for name in ('nobody.test', 'b.test', 'c.test', None):
            if name is None:
                context = dh.tls_context()
                connection = socket.create_connection(('127.0.0.1', alone.tls_port), 9)
                with pytest.raises(EnvironmentError):
                    context.wrap_socket(connection)
                connection.close()
            else:
                with pytest.raises(EnvironmentError):
                    alone.ask_tls(name, 'GET / HTTP/1.1', 'Host: ' + name)
        assert ' 403 ' in alone.ask_tls('a.test', 'GET / HTTP/1.1', A_TEST)[:15]

def test_nginx_answers_503_by_https_too_for_a_stopped_app(tmpdir, told):
    version = Host('/').nginx.version()
    text = dh.closed_proxy(dh.render_proxy('a', 'a.test', version, False), version)
    text += dh.upstream('a', [('127.0.0.1', told.port)], version)
    with behind_https(tmpdir, text, 'a.test') as alone:
        answer = alone.ask_tls('a.test', 'GET / HTTP/1.1', A_TEST)
        assert answer.startswith('HTTP/1.1 503 ') and 'Retry-After: 60\r\n' in answer
        assert alone.ask(CHALLENGE, A_TEST).endswith('\r\n\r\nyes')
        assert alone.ask_tls('a.test', CHALLENGE, A_TEST).endswith('\r\n\r\nyes')

def test_nginx_finds_nothing_to_warn_of_in_what_https_adds(tmpdir, told):
    version = Host('/').nginx.version()
    text = dh.render_proxy('a', 'a.test b.test', version, False, '10.0.0.0/8')
    text += dh.upstream('a', [('127.0.0.1', told.port)], version) + GUARDED.replace(
        'a.test b.test', 'd.test')
    with behind_https(tmpdir, text, 'a.test', 'c.test', 'd.test') as alone:
        assert dh.read_file(alone.folder + '/error.log') == ''

# ---- The machine: files, locks, signals, commands --------------------------------------

def test_what_a_stranger_sent_is_printed_as_plain_ascii():
    assert dh.printable('a b\x1b[31m\n\r\0') == 'a b?[31m???'
    assert dh.printable('x' * 90) == 'x' * 80 + '...'

@table('given, said', r'''
    \e[1;31mred\e[0m\_ => red
    a\tb               => a\tb
    \0a\r              => a
    \e]0;title\e\\a    => a
    a{CSI}31mb         => a31mb
    \e]0;title a      => ]0;title a
    \e[?25lx\e[K       => x'''.replace('{CSI}', dh.to_text(b'\xc2\x9b')))
def test_a_line_of_output_loses_its_control_characters(given, said):
    assert dh.plain_line(given) == said

OWN = dh.Account('git', USER, GROUP, '/home/git', '/bin/sh')

def mode_of(path):
    return mode_in(os.lstat(str(path)))

def owner_of(path):
    found = os.lstat(str(path))
    return found.st_uid, found.st_gid

def test_a_file_is_replaced_whole_and_only_when_it_differs(tmpdir):
    path = str(tmpdir.join('x.conf'))
    assert dh.replace_file(path, 'one', 0o640) is True
    assert mode_of(path) == '640'
    first = os.stat(path).st_ino
    assert dh.replace_file(path, 'one', 0o640) is False
    assert os.stat(path).st_ino == first
    assert dh.replace_file(path, 'one', 0o600) is True and mode_of(path) == '600'
    with open(path) as kept:
        assert dh.replace_file(path, 'two') is True and mode_of(path) == '644'
        assert kept.read() == 'one' and dh.read_file(path) == 'two'
    assert os.listdir(str(tmpdir)) == ['x.conf']

def test_a_file_is_checked_before_it_takes_the_place_of_the_old(tmpdir):
    path, seen = str(tmpdir.join('x.conf')), []

    def check(new):
        seen.append((dh.read_file(new), dh.read_file(path), mode_of(new)))
        assert not new.endswith('.conf') and os.path.dirname(new) == str(tmpdir)
        raise Failure('no')
    dh.replace_file(path, 'one')
    assert refusal(dh.replace_file, path, 'two', 0o440, check) == 'no'
    assert seen == [('two', 'one', '440')]
    assert dh.read_file(path) == 'one' and os.listdir(str(tmpdir)) == ['x.conf']

def test_a_file_that_cannot_be_written_is_named(tmpdir):
    path, limits = str(tmpdir.join('x')), resource.getrlimit(resource.RLIMIT_FSIZE)
    dh.replace_file(path, 'one')
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))       # as a full disk
    try:
        assert refusal(dh.replace_file, path, 'two') == path + ': File too large'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert dh.read_file(path) == 'one' and os.listdir(str(tmpdir)) == ['x']

def test_a_file_is_not_written_through_a_link_in_its_way(tmpdir):
    victim = tmpdir.join('victim')
    victim.write('kept')
    os.symlink(str(victim), str(tmpdir.join('.x.new')))
    dh.replace_file(str(tmpdir.join('x')), 'two')
    assert victim.read() == 'kept' and tmpdir.join('x').read() == 'two'
    assert sorted(os.listdir(str(tmpdir))) == ['victim', 'x']

def test_bytes_of_any_kind_go_through_a_file(tmpdir):
    tmpdir.join('x').write_binary(b'\xff\xc3\xa4\r\n')
    dh.replace_file(str(tmpdir.join('y')), dh.read_file(str(tmpdir.join('x'))))
    assert tmpdir.join('y').read_binary() == b'\xff\xc3\xa4\r\n'
    assert dh.read_file(str(tmpdir.join('none'))) is None
    assert dh.read_file(str(tmpdir.join('x/y'))) is None

def test_a_link_is_moved_in_one_step(tmpdir):
    path = str(tmpdir.join('live'))
    os.symlink('left by a crash', dh.temporary_of(path))
    assert [dh.replace_link(path, to) for to in ('a', 'a', 'b')] == [True, False, True]
    assert os.readlink(path) == 'b' and os.listdir(str(tmpdir)) == ['live']

def test_a_folder_is_made_with_those_above_it_and_what_is_there_left_alone(tmpdir):
    os.chmod(str(tmpdir), 0o1777)
    path = str(tmpdir.join('a/b'))
    assert [dh.make_folder(path, 0o700, OWN) for _ in range(2)] == [True, False]
    assert (mode_of(path), owner_of(path)) == ('700', (USER, GROUP))
    assert (mode_of(tmpdir), mode_of(tmpdir.join('a'))) == ('1777', '755')
    assert dh.make_folder(path, 0o750) is True and owner_of(path) == (USER, GROUP)

def test_removing_says_whether_there_was_anything(tmpdir):
    tmpdir.join('x').write('')
    paths = [str(tmpdir.join(name)) for name in ('x', 'x', 'y/z')]
    assert [dh.remove_file(path) for path in paths] == [True, False, False]

@contextmanager
def a_pipe():
    """The two ends of a pipe; close() closes one before the block ends."""
    ends = list(os.pipe())
    try:
        yield ends
    finally:
        for which in range(len(ends)):
            close(ends, which)

def close(ends, which):
    if ends[which] is not None:
        os.close(ends[which])
    ends[which] = None

@contextmanager
def standard_error_to(fd):
    kept = os.dup(2)
    os.dup2(fd, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)

def test_a_lock_has_one_holder_who_can_be_named(tmpdir):
    path, order = str(tmpdir.join('locks/blog')), []

    def wait():
        with dh.locked(path, 'a push by bob'):
            order.append('second')
    other = threading.Thread(target=wait)
    with dh.locked(path, 'a push by anna'), a_pipe() as ends, standard_error_to(ends[1]):
        assert dh.read_file(path).startswith('a push by anna, since ')
        held = [fd for fd in os.listdir('/proc/self/fd')
                if os.path.realpath('/proc/self/fd/' + fd) == os.path.realpath(path)]
        assert fcntl.fcntl(int(held[0]), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        other.start()
        assert os.read(ends[0], 99).startswith(b'-----> Waiting for a push by anna')
        order.append('first')
    other.join()
    assert order == ['first', 'second']
    assert dh.read_file(path).count('\n') == 1 and 'a push by bob' in dh.read_file(path)

def test_a_lock_is_given_back_when_its_block_fails(tmpdir):
    path = str(tmpdir.join('blog'))
    with pytest.raises(Failure):
        with dh.locked(path, 'x'):
            raise Failure('no')
    with open(path, 'a') as holder:
        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)

def test_undos_happen_last_first_each_for_itself_and_the_first_error_wins(capfd):
    order = []

    def undo(what, error=None):
        order.append(what)
        if error:
            raise error
    with pytest.raises(Failure) as caught:
        with dh.undone_by(undo, 1), dh.undone_by(undo, 2, Failure('undo 2')), \
                dh.undone_by(undo, 3, IOError(5, 'undo 3')):
            raise Failure('first')
    assert str(caught.value) == 'first' and order == [3, 2, 1]
    err = capfd.readouterr().err
    assert 'dockhand: while undoing: undo 2\n' in err and 'undo 3' in err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN

def test_what_ends_well_is_not_undone():
    with dh.undone_by(pytest.fail, 'undone'):
        pass
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_raised_so_that_undo_runs(number):
    dh.on_signals(dh.leave)
    with pytest.raises(dh.Stopped) as caught:
        os.kill(os.getpid(), number)
    assert str(caught.value) == 'stopped by signal %d' % number

@pytest.mark.parametrize('before', [[], ['timeout', '30']])
def test_a_command_does_not_go_on_alone_when_we_are_stopped(tmpdir, before):
    noted = str(tmpdir.join('pid'))
    earlier = signal.signal(signal.SIGALRM, dh.leave)
    signal.setitimer(signal.ITIMER_REAL, 1)
    with pytest.raises(dh.Stopped):
        dh.execute(before + ['sh', '-c', 'echo $$ >%s; exec sleep 30' % noted])
    signal.signal(signal.SIGALRM, earlier)
    title = '/proc/%s/cmdline' % dh.read_file(noted).strip()
    assert until(lambda: dh.read_file(title) or '', '', 5) == ''

@pytest.mark.parametrize('error', [None, ValueError])
def test_a_command_that_was_begun_ends_with_what_it_was_begun_beside(tmpdir, error):
    noted = str(tmpdir.join('pid'))
    try:
        with dh.begin_command(
                ['sh', '-c', 'echo $$ >%s; exec sleep 30' % noted]) as command:
            assert until(lambda: bool(dh.read_file(noted)), True, 5)
            assert not command.is_over()
            if error:
                raise error()
    except ValueError:
        pass
    title = '/proc/%s/cmdline' % dh.read_file(noted).strip()
    assert until(lambda: dh.read_file(title) or '', '', 5) == ''

def test_a_command_that_was_begun_gives_its_result_when_it_is_asked_for():
    with dh.begin_command(['sh', '-c', 'echo a; echo b >&2; exit 3']) as command:
        assert until(command.is_over, True, 5)
        assert command.result() == Result(3, 'a\n', 'b\n')
    much = 'head -c 1000000 /dev/zero | tr "\\0" x'      # more than a pipe holds
    with dh.begin_command(['sh', '-c', much]) as command:
        assert len(command.result().out) == 1000000
    with dh.begin_command(['/no/such/command']) as command:
        status, _, err = command.result()
    assert status == 127 and '/no/such/command' in err

def test_a_command_that_was_begun_ends_by_itself_though_we_are_killed(
        tmpdir, monkeypatch):
    monkeypatch.setattr(dh, 'LONGEST_BESIDE', 1)
    noted = str(tmpdir.join('pid'))
    child = os.fork()
    if not child:
        dh.begin_command(['sh', '-c', 'echo $$ >%s; exec sleep 30' % noted])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert until(lambda: bool(dh.read_file(noted)), True, 5)
    title = '/proc/%s/cmdline' % dh.read_file(noted).strip()
    assert until(lambda: dh.read_file(title) or '', '', 10) == ''

def test_two_commands_run_beside_one_another(tmpdir):
    """Each waits for what the other one does."""
    turn = 'touch %s; for _ in $(seq 200); do [ -e %s ] && exit; sleep 0.05; done; exit 1'
    paths = str(tmpdir.join('a')), str(tmpdir.join('b'))
    with dh.begin_command(['sh', '-c', turn % paths]) as one:
        with dh.begin_command(['sh', '-c', turn % paths[::-1]]) as other:
            assert (one.result().status, other.result().status) == (0, 0)

def read_to_end(fd):
    parts = []
    while parts[-1:] != [b'']:
        parts.append(os.read(fd, 65536))
    return b''.join(parts)

def test_a_pusher_who_reads_hears_everything():
    with a_pipe() as ends:
        got, lines = [], ['%06d %s' % (number, 'x' * number) for number in range(700)]
        reader = threading.Thread(target=lambda: got.append(read_to_end(ends[0])))
        reader.start()
        voice = dh.Voice(ends[1])
        for line in lines:
            voice(line)
        close(ends, 1)
        reader.join()
        assert dh.to_text(got[0]).split('\n') == lines + ['']

def test_a_pusher_who_is_stopped_holds_nothing_up_and_hears_no_more():
    with a_pipe() as ends:
        voice = dh.Voice(ends[1], patience=0.05)
        voice('x' * 2 ** 20)
        assert voice.patience <= 0
        held = os.read(ends[0], 2 ** 20)
        voice('later')
        close(ends, 1)
        assert set(held) <= set(b'x') and read_to_end(ends[0]) == b''

def test_a_pusher_who_is_gone_is_no_error():
    with a_pipe() as ends:
        close(ends, 0)
        voice = dh.Voice(ends[1])
        voice('x')
        assert voice.patience == 0

def shell(text, **options):
    return dh.execute(['sh', '-c', text], **options)

def test_a_command_gives_its_status_and_both_its_outputs():
    assert shell('echo a; echo b >&2; exit 3') == Result(3, 'a\n', 'b\n')
    assert dh.execute(['printf', '%s', '$(id) `id` ;']) == Result(0, '$(id) `id` ;', '')

def test_a_command_gets_its_own_environment_folder_and_input(tmpdir):
    env = dict(dh.ENVIRONMENT, A='b')
    assert sorted(dh.execute(['env'], env={'A': 'b'}).out.splitlines()) == sorted(
        '%s=%s' % pair for pair in env.items())
    assert shell('pwd', cwd=str(tmpdir)).out == str(tmpdir) + '\n'
    assert dh.execute(['cat']).out == ''

def test_a_command_runs_as_another_account():
    user = pwd.getpwnam('nobody') if os.geteuid() == 0 else pwd.getpwuid(os.getuid())
    account = dh.Account(user.pw_name, user.pw_uid, user.pw_gid, '/home/x', '/bin/sh')
    said = shell('id -u; id -g; id -G; echo $HOME $USER $LOGNAME', account=account)
    said = said.out.split()
    assert said[:2] == [str(user.pw_uid), str(user.pw_gid)]
    assert said[-3:] == ['/home/x', user.pw_name, user.pw_name]
    assert os.geteuid() or said[2:-3] == [str(user.pw_gid)]

def test_a_command_inherits_no_descriptor_and_dies_of_a_broken_pipe():
    with a_pipe() as ends:
        ends.append(os.dup(ends[0]))
        fcntl.fcntl(ends[2], fcntl.F_SETFD, 0)
        assert shell('test -e /proc/self/fd/%d' % ends[2]).status == 1
    assert shell('kill -PIPE $$').status == -signal.SIGPIPE

def test_each_line_of_both_outputs_is_given_without_control_characters():
    lines = []
    text = r"printf 'a\rb\n'; printf '\033[31mred\033[0m\007\n' >&2; printf 'last'"
    result = shell(text, each=lines.append)
    assert [line for line in lines if line] == ['a', 'b', 'red', 'last']
    assert result.status == 0 and shell('exit 4', each=lines.append).status == 4

def test_lines_as_a_terminal_gets_them_are_parted_by_no_empty_ones():
    """Such are those of a job's log, which init reads from a pty."""
    lines = []
    shell(r"printf 'a\r\n\r\nb\r'; sleep 0.2; printf '\nc\r\n'", each=lines.append)
    assert lines[:4] == ['a', '', 'b', 'c']

@table('text, lines', r"""
    a\r\r\nb\r\n       => a|b
    a\r\n\r\nb         => a||b
    a\r\r\n\r\r\nb     => a||b
    \n\na\n\n          => ||a|
    1%\r2%\r\r3%\n      => 1%|2%|3%
    \r1%\r2%           => 1%|2%
    a\r                => a""")
def test_what_parts_lines_is_read_the_same_wherever_a_pipe_parts_it(text, lines):
    for size in (1, 2, 3, 99):
        reader, found = dh.LineReader(), []
        for at in range(0, len(text), size):
            found += reader.feed(dh.to_bytes(text[at:at + size]))
        assert found + reader.feed(b'') == lines.split('|')

@each('letters', r'x \_ \e[1 \\ {"a":')
def test_one_line_without_end_is_cut_and_costs_no_more_than_many(letters):
    """What joins or searches all of it again for each piece does not end here."""
    count = 2 ** 20 // len(letters)
    write = 'import os, sys\nfor _ in range(64): os.write(1, sys.argv[1].encode() * %d)'
    lines = []
    with ending():
        dh.execute([sys.executable, '-c', write % count, letters], each=lines.append)

    left_out = 64 * count * len(letters) - dh.LINE_LIMIT
    shown = dh.plain_line((letters * dh.LINE_LIMIT)[:dh.LINE_LIMIT])
    assert lines == [shown + ' ... (%d bytes of this line are left out)' % left_out]

@pytest.mark.parametrize('size', [0, 1, dh.LINE_LIMIT - 1, dh.LINE_LIMIT])
def test_a_line_up_to_the_limit_is_shown_whole(size):
    lines = []
    shell('head -c %d /dev/zero | tr "\\0" x; echo; echo y' % size, each=lines.append)
    assert lines == ['x' * size, 'y']

def test_the_line_after_one_that_was_cut_is_whole():
    lines = []
    size = dh.LINE_LIMIT + 5
    shell('head -c %d /dev/zero | tr "\\0" x; echo; echo y; printf z' % size,
          each=lines.append)
    assert lines == ['x' * dh.LINE_LIMIT + ' ... (5 bytes of this line are left out)',
                     'y', 'z']

def test_a_command_that_is_missing_is_named():
    assert refusal(dh.execute, ['no-such-command', 'x']).startswith('no-such-command: No')

def test_a_command_that_fails_is_told_with_its_last_words():
    def run(argv):
        return Result(2, 'out\n', 'first\n\x1b[1mlast\x1b[0m\nError: failed to start '
                      'containers: blog--3\n\n')
    assert refusal(Host('/', run).run, ['docker', 'start', 'blog--3', 'x', 'y']) == \
        'docker start blog--3 x failed (2): last'
    assert Host('/', run).ask(['docker']).status == 2

def test_output_that_is_interrupted_ends_the_command():
    pids = []

    def stop(line):
        pids.append(int(line))
        raise Failure('stopped')
    assert refusal(lambda: shell('echo $$; exec sleep 600', each=stop)) == 'stopped'
    assert not os.path.exists('/proc/%d' % pids[0])

def test_the_end_of_what_the_runtime_says_is_not_all_that_is_said():
    """As docker does where a container that it is to update comes to its end."""
    said = ('Error response from daemon: Cannot update container 3f: not running\n'
            ': unknown\n')
    assert dh.last_line(said) == said.split('\n')[0]

USAGE = """

Usage:  docker create [OPTIONS] IMAGE [COMMAND] [ARG...]

"""

@pytest.mark.parametrize('said, reason', [
    ('unknown flag: --x' + USAGE + "Run 'docker create --help' for more information\n",
     'unknown flag: --x'),
    ("unknown flag: --x\nSee 'docker create --help'.\n", 'unknown flag: --x'),
    ("docker: 'docker create' requires at least 1 argument" + USAGE +
     "See 'docker create --help' for more information\n",
     "docker: 'docker create' requires at least 1 argument"),
    ('"docker create" requires at least 1 argument.\nSee \'docker create --help\'.' +
     USAGE + 'Create a new container\n',
     '"docker create" requires at least 1 argument.'),
    ("docker: invalid hostPort: 99999\n\nRun 'docker run --help' for more information\n",
     'docker: invalid hostPort: 99999'),
    ("Unable to find image 'x' locally\ndocker: Error response from daemon: pull access "
     "denied.\nSee 'docker run --help'.\n",
     'docker: Error response from daemon: pull access denied.'),
    ("docker: 'x' is not a docker command.\nSee 'docker --help'\n",
     "docker: 'x' is not a docker command."),
    ("error: unknown option `x'\nusage: git ls-tree [-d]\n\n    -d   only show trees\n",
     "error: unknown option `x'"),
    ('Usage: tail\nlast\n', 'last'), ('', ''), ('\n\n', ''),
    ("See 'docker run --help'.\n", "See 'docker run --help'.")])
def test_a_reason_is_not_hidden_behind_how_to_use_a_command(said, reason):
    assert dh.last_line(said) == reason

def test_a_path_stays_under_the_root(tmpdir):
    host = Host(str(tmpdir))
    assert host.path('/etc/x') == host.path('etc', '/x') == str(tmpdir.join('etc/x'))

@pytest.mark.skipif(os.getuid() != 0, reason='only root can give a folder away')
def test_locks_in_a_folder_of_somebody_else_are_refused(plain):
    folder = plain.host.path(dh.LOCKS)
    dh.make_folder(folder)
    plain.write('/etc/shadow', 'kept')
    os.symlink(plain.host.path('/etc/shadow'), folder + '/blog')
    os.chown(folder, USER, GROUP)
    assert 'somebody else made' in refusal(dh.cmd_stop, plain.app)
    assert plain.read('/etc/shadow') == 'kept'

# ---- Docker ----------------------------------------------------------------------------

@table('out, version', r'''
    Client:\n Version: 29.0\nServer: Docker\n Engine:\n  Version: 28.1.0 => 28.1.0
    Client:\n Version: 1.9\n\nServer:\n Version:      1.10.3\n           => 1.10.3
    Client version: 0.7.1\nServer version: 0.7.6\n                       => 0.7.6''')
def test_the_version_of_the_engine_counts_not_the_clients(out, version):
    found = Host('/', lambda argv: Result(0, out, '')).docker.version()
    assert '.'.join(str(part) for part in found) == version

def test_a_docker_that_does_not_answer_is_said_with_its_words():
    result = Result(1, 'Client:\n Version: 28.1\n', 'Cannot connect.\n')
    host = Host('/', lambda argv: result)
    assert refusal(host.docker.version) == 'docker does not answer: Cannot connect.'
    result = Result(1, '[]', 'failed to connect to the docker API at unix:///x\n')
    said = refusal(Host('/', lambda argv: result).docker.inspect, 'a')
    assert said.endswith('unix:///x')
    result = Result(1, '[]\n', 'error: no such object: a\n')
    assert Host('/', lambda argv: result).docker.inspect('a') == []

LEAVING = 'Error response from daemon: removal of container x is already in progress'

@each('names', 'a a,b')
def test_a_container_that_docker_is_removing_is_waited_for(names):
    """Its name is taken until then."""
    asked, left = [], [3]

    def run(argv):
        asked.append(' '.join(argv[:2]))
        if argv[1] == 'inspect':
            left[0] -= 1
            return Result(left[0] < 0, '[{}]' if left[0] >= 0 else '[]', 'no such object')
        is_first = argv[-1] == 'a' or len(argv) > 4
        return Result(1, '', LEAVING if is_first else 'Error: No such container: b')

    clock = Clock()
    Host('/', run, clock=clock).docker.remove_containers(names.split(','))
    assert asked.count('docker inspect') == 4 and clock.monotonic() > 0
    left[0] = 10 ** 9
    assert 'does not come to an end with removing a' in refusal(
        Host('/', run, clock=clock).docker.remove_containers, names.split(','))

def test_a_container_that_is_marked_for_removal_is_made_anew(plain):
    live = plain.lives(ONE_WEB)
    dh.cmd_stop(plain.app)
    plain.leaving = 'blog--1'           # as a killed `docker rm -f` leaves it for a while
    dh.cmd_start(plain.app)
    assert plain.containers['blog--1']['State']['Running'] and plain.leaving is None
    assert plain.app.live().number == live.number

@table('status, err, said', """
    1   => failed to connect to the docker API at unix:///x: connect: no such file or directory => (1)
    127 => timeout: failed to run command 'docker': No such file or directory => (127)
    124 =>                                                        => came to no end in time""")
def test_docker_that_is_away_is_no_answer_that_there_is_nothing(status, err, said):
    host = Host('/', lambda argv: Result(int(status), '[]', err))
    assert said in refusal(host.docker.inspect, 'a')

def test_an_answer_that_was_interrupted_is_none(monkeypatch):
    with dh.begin_command(['true']) as command:
        with monkeypatch.context() as patched:
            patched.setattr(command.process, 'communicate', lambda: dh.leave(15, None))
            with pytest.raises(dh.Stopped):
                command.result()
        assert command.result().status == 1

@pytest.mark.parametrize('has_list', [True, False])
def test_the_children_of_a_process_are_those_that_linux_lists(monkeypatch, has_list):
    if not has_list:                        # as on Ubuntu 12.04
        monkeypatch.setattr(dh, 'listed_children', lambda host, parent: None)
    host, own = Host('/'), str(os.getpid())
    with dh.Begun(dh.start_command(['sleep', '9'])) as one, \
            dh.Begun(dh.start_command(['sleep', '9'])) as two:
        pids = [str(each.process.pid) for each in (one, two)]
        assert until(lambda: [dh.children(host, own).get(pid) for pid in pids],
                     2 * ['sleep\0009\0'], 5) == 2 * ['sleep\0009\0']
        found = dh.children(host, own)
        assert all(dh.process_fields(host, pid)[1] == own for pid in found)
    assert not set(dh.children(host, own)) & set(pids)

def test_a_process_that_hides_another_as_it_ends_is_noticed(monkeypatch):
    lists = [['7', '8'], ['7'], ['8', '9'], ['8', '9']]
    monkeypatch.setattr(dh, 'listed_children', lambda host, parent: lists.pop(0))
    assert set(dh.children(Host('/'), '1')) == {'8', '9'} and not lists

def test_a_tag_is_moved_by_docker_before_1_10_too():
    done = []

    def run(argv):
        done.append(' '.join(argv))
        return Result('-f' not in argv, '', 'Conflict: Tag latest is already set to x\n')
    run.is_late, run.begin = False, functools.partial(Beside, run)
    docker = Host('/', run).docker
    docker.tag('a:1', 'a:latest')
    moved = ['docker tag a:1 a:latest', 'docker tag -f a:1 a:latest']
    assert done == moved
    with docker.tagging('a:1', 'a:latest'):
        assert done == moved + moved[:1]
    assert done == 2 * moved

@table('heard, status, said', '''
    x                                        => 1   => nothing has changed; mend
    exit code 1370                           => 1   => nothing has changed; mend
    x                                        => 137 => out of memory (137)
    The command returned a non-zero code: 137 => 1  => out of memory
    did not complete: exit code: 137         => 1   => out of memory
    exec /bin/sh: exec format error          => 1   => exec format error''')
def test_the_known_reasons_of_a_failed_build_are_named(heard, status, said):
    def run(argv, each=None, **options):
        if each:
            each(heard)
        return Result(int(status) if each else 0, 'Server version: 1.0.0', '')
    why = refusal(Host('/', run).docker.build, '/tmp', 'a:1', [])
    assert why.startswith('the build failed: ' + said)

RUNNING = {'Running': True, 'StartedAt': '1', 'ExitCode': 0}
BOUND = {'PortBindings': {'80/tcp': [], '53/udp': [], '25/tcp': None}}

@pytest.mark.parametrize('more, alive, ports, health', [
    ({}, True, [], ''), ({'State': dict(RUNNING, Running=False)}, False, [], ''),
    ({'State': dict(RUNNING, Restarting=True)}, False, [], ''),
    ({'State': dict(RUNNING, Health={'Status': 'starting'})}, True, [], 'starting'),
    ({'State': dict(RUNNING, Health=None), 'HostConfig': None, 'NetworkSettings': None},
     True, [], ''),
    ({'HostConfig': BOUND, 'NetworkSettings': {'Networks': {'b': {'IPAddress': 'ip'}}}},
     True, [('ip', 25), ('ip', 80)], ''),
    ({'HostConfig': BOUND, 'NetworkSettings': {'IPAddress': 'ip'}},
     True, [('ip', 25), ('ip', 80)], ''),
    ({'HostConfig': BOUND, 'NetworkSettings': {'Networks': {'host': {'IPAddress': ''}}}},
     True, [], '')])
def test_the_state_of_a_container_is_read_from_any_docker(more, alive, ports, health):
    found = dh.container_state(dict({'Id': 'c', 'State': RUNNING}, **more))
    assert (found.alive, found.ports, found.health) == (alive, ports, health)

KILLED = dict(RUNNING, OOMKilled=True)

@pytest.mark.parametrize('state, restarts, text, past', [
    (dict(RUNNING, Running=False, ExitCode=3), 0, 'exited with 3', ''),
    (dict(KILLED, Running=False, ExitCode=137), 0,
     'exited with 137, out of memory: the kernel killed it', ''),
    (dict(KILLED, Restarting=True, ExitCode=1), 1,
     'exited with 1, out of memory: the kernel killed it',
     'started again 1 time, out of memory: the kernel killed it'),
    (RUNNING, 2, 'running', 'started again 2 times'),
    (KILLED, 0, 'running', ''), (RUNNING, None, 'running', '')])
def test_a_kill_for_memory_is_named(state, restarts, text, past):
    found = dh.container_state({'Id': 'c', 'State': state, 'RestartCount': restarts})
    assert (found.text, found.past) == (text, past)

def test_apps_says_what_was_started_again_and_why(plain, capfd):
    plain.lives(ONE_TYPES, scale='web=2 worker=2')
    for name in ('blog--1', 'blog--1--worker--2'):
        plain.containers[name].update(RestartCount=4)
    plain.containers['blog--1']['State']['OOMKilled'] = True
    dh.cmd_apps(plain.host)
    said = capfd.readouterr().out
    assert '  started again 4 times, out of memory: the kernel killed it; worker.2 ' \
           'started again 4 times  web=2 worker=2\n' in said

@pytest.mark.parametrize('log, said', [
    ([{'ExitCode': 1, 'Output': 'first'}, {'ExitCode': 22, 'Output': 'curl: (22) 500\n'}],
     'exit status 22: curl: (22) 500'),
    ([{'ExitCode': -1, 'Output': 'Health check exceeded timeout (30s)'}],
     'exit status -1: Health check exceeded timeout (30s)'),
    ([{'ExitCode': 1, 'Output': ''}], 'exit status 1, without a word'),
    ([{'ExitCode': 1, 'Output': u'a\r\n\tb \x1b[31mc\x1b[0m\0 \xe9\n'}],
     'exit status 1: a b c ' + dh.printable(dh.native(u'\xe9'))),
    ([{'ExitCode': 7, 'Output': 'x' * 5000 + ' the end'}],
     'exit status 7: ...' + 'x' * 152 + ' the end'),
    ([{'ExitCode': 0, 'Output': 'well'}], ''), ([], ''), (None, '')])
def test_what_a_healthcheck_said_last_is_read_for_the_pusher(log, said):
    health = {'Status': 'unhealthy', 'Log': log}
    found = dh.container_state({'Id': 'c', 'State': dict(RUNNING, Health=health)})
    assert found.check == said

CHECKED = 'EXPOSE 8000\nHEALTHCHECK x'

def test_an_app_that_is_unwell_is_refused_with_what_its_check_said(plain):
    plain.lives(ONE_WEB)
    start = plain.docker_start

    def sick(*words):
        start(*words)
        plain.find(words[-1])['State']['Health'] = {
            'Status': 'unhealthy', 'Log': [{'ExitCode': 7, 'Output': 'no database\n'}]}
    plain.docker_start = sick
    said = refusal(plain.push, an_app('two', CHECKED))
    assert said.endswith('its HEALTHCHECK says unhealthy, exit status 7: no database')
    assert plain.app.load(2).failed == said

def test_a_check_that_is_still_starting_says_why(plain):
    unready = dh.State(True, 1, [], 'starting', 'running', 'exit status 1: not yet')
    assert unwell(Engine(unready), 0.3) == (
        'after 0 s its HEALTHCHECK is still starting, exit status 1: not yet' + LONGER)

# ---- Addresses -------------------------------------------------------------------------

# Those of plain apps, in a network that no route leads to.

@pytest.mark.skipif(os.geteuid() != 0, reason='wants root, for a network of its own')
@table('route, routed', """
    10.86.0.0/16 dev lo                   => 10.86
    10.0.0.0/8 dev lo metric 7            => 10.86 10.87 10.127
    10.86.3.0/24 dev lo                   => 10.86
    10.86.3.4 dev lo                      => 10.86
    10.86.0.0/15 dev lo                   => 10.86 10.87
    172.16.0.0/12 dev lo                  => 172.31 172.20
    default dev lo                        =>
    0.0.0.0/1 dev lo                      =>
    blackhole 10.86.0.0/16                => 10.86
    unreachable 10.0.0.0/9                => 10.86 10.87 10.127
    192.168.1.0/24 dev lo src 127.0.0.1   =>
    110.86.0.0/16 dev lo                  =>""")
def test_a_subnet_that_a_route_leads_to_is_known(route, routed):
    namespace = ['unshare', '--net', 'sh', '-c',
                 'ip link set lo up && ip route add $0 && "$@"']

    def inside(argv, **options):
        return dh.execute(namespace + [route] + argv, **options)
    assert [each for each in '10.86 10.87 10.127 172.31 172.20'.split()
            if dh.is_routed(dh.Host(run=inside), each)] == routed.split()

@pytest.mark.parametrize('there, routes, subnet', [
    (None, '', '10.86'), (None, '10.86.0.0/16 dev br\n', '10.87'),
    (None, '10.0.0.0/8 dev tun0\n', '172.31'),
    ('10.99', '10.99.0.0/16 dev br-1\n', '10.99'),
    (None, '10.0.0.0/8 dev a\n172.28.0.0/14 dev b\n', '172.27')])
def test_a_network_gets_a_subnet_that_nobody_has(plain, there, routes, subnet):
    plain.routes += routes
    if there:
        plain.docker_network('network', 'create', '--subnet=%s.0.0/16' % there,
                             'dockhand')
    assert plain.host.docker.subnet() == subnet
    live = plain.lives(ONE_WEB)
    assert live.addresses == [subnet + '.0.2']
    assert plain.networks['dockhand']['IPAM']['Config'][0]['Subnet'] == subnet + '.0.0/16'

def test_a_host_without_a_free_subnet_is_said(plain):
    plain.routes += '10.0.0.0/8 dev a\n172.16.0.0/12 dev b\n'
    assert 'no /16 of 10.86 to 172.31 is free' in refusal(plain.host.docker.subnet)

def test_an_address_is_given_once_kept_releases_included(plain):
    wiki = dh.App(plain.host, 'wiki')
    for number, address in enumerate(['10.86.0.2', None, '10.86.0.4', '10.86.0.250'], 1):
        wiki.save(release(app='wiki', number=number, addresses=[address] if address else []))
    assert len(os.listdir(wiki.folder('releases'))) == 4
    assert dh.free_addresses(plain.host, 2) == ['10.86.0.3', '10.86.0.5']
    plain.app.save(release(number=1, addresses=['10.86.0.3']))
    assert dh.free_addresses(plain.host, 1) == ['10.86.0.5']

def test_there_are_more_addresses_than_one_byte_holds(plain):
    for at in range(251):
        path = plain.app.release_folder(at + 1) + '/release.json'
        dh.make_folder(os.path.dirname(path))
        with open(path, 'w') as target:
            json.dump({'address': '10.86.%d.%d' % (at // 250, at % 250 + 2)}, target)
    assert dh.free_addresses(plain.host, 1) == ['10.86.1.3']

DAEMON = '/etc/docker/daemon.json'

OTHER_OPTIONS = (
    '{"mtu": 1400, "default-network-opts": {"bridge": '
    '{"com.docker.network.driver.mtu": "1300"}}}')      # of docker 24

@table('settings, command, option', r"""
                                    =>                           =>
    {"mtu": 1400}                   =>                           => 1400
    {"bip": "10.9.0.1/16",\n "mtu":\t9000,\n "ipv6": true} =>    => 9000
    {"mtu": 0}                      =>                           =>
    {"mtu": "1400"}                 =>                           =>
    {"default-address-pools": [{"base": "10.0.0.0/8", "size": 24}]} =>  =>
    {"userland-proxy": false, "icc": false, "mtu": 1280}         => => 1280
    {                               =>                           =>
    {"mtu": 1400                    => dockerd\0--mtu=1300\0     => 1400
                                    => dockerd\0--mtu=1300\0     => 1300
                                    => dockerd\0--mtu\01300\0  => 1300
                                    => dockerd\0--mtux=1300\0    =>""",
       (OTHER_OPTIONS, '', ''))
def test_our_network_takes_the_size_of_packets_that_docker_is_told(
        plain, settings, command, option):
    if settings:
        plain.write(DAEMON, settings)
    if command:
        plain.write('/run/docker.pid', '60\n')
        plain.write('/proc/60/cmdline', command)
    plain.host.docker.ensure_network('10.86.0.2')
    given = '--opt=com.docker.network.driver.mtu=%s ' % option if option else ''
    assert plain.done == [
        'docker network create --subnet=10.86.0.0/16 --ip-range=10.86.255.0/24 '
        '--gateway=10.86.0.1 %sdockhand' % given]

OURS = {'Driver': 'bridge', 'Labels': {}, 'IPAM': {'Config': [
    {'Subnet': '10.86.0.0/16', 'IPRange': '10.86.255.0/24', 'Gateway': '10.86.0.1'}]}}

def with_pool(*pools, **changes):
    return dict(OURS, IPAM={'Config': [dict(OURS['IPAM']['Config'][0], **pool)
                                       for pool in pools]}, **changes)

@pytest.mark.parametrize('network, ours', [
    (OURS, True), (dict(OURS, Options={'com.docker.network.driver.mtu': '1400'}), True),
    (with_pool({'Gateway': '10.86.0.1/16'}), True),     # as docker 1.11 shows it
    (with_pool({}, {'Subnet': 'fd00::/64', 'Gateway': 'fd00::1'}), True),
    (with_pool({}, {'Subnet': '10.99.0.0/16'}), False),
    (dict(OURS, Driver='macvlan'), False), (with_pool(), False),
    (with_pool({'IPRange': ''}), False), (with_pool({'Gateway': '10.86.0.254'}), False),
    (with_pool({'Subnet': '10.86.0.0/24'}), False),
    (with_pool({'IPRange': '10.87.255.0/24'}), False),
    ({'Driver': 'bridge', 'IPAM': {'Config': None}}, False), ({}, False)])
def test_our_network_is_known_by_its_shape(network, ours):
    assert dh.is_our_network(network) == ours

# ---- nginx -----------------------------------------------------------------------------

@table('line', r'''
    include /etc/nginx/conf.d/*.conf;
    include conf.d/*.conf ;
    include\tconf.d/*;''')
def test_a_candidate_is_staged_in_a_copy_of_nginx_conf(line):
    files = ['/a.conf', '/b\\1.conf']
    assert dh.stage_nginx_conf(NGINX_CONF % line, 'server { }\n', files) == '''\
pid /dev/null; user www-data;

events { worker_connections 768; }
http {
    include /etc/nginx/mime.types;
    server { }
include /a.conf;
include /b\\1.conf;

    include /etc/nginx/sites-enabled/*;
}
'''

def test_a_configuration_that_does_not_include_conf_d_is_refused():
    said = refusal(dh.stage_nginx_conf, NGINX_CONF % '', '', [])
    assert 'add it to its http block' in said

@table('err, said', r'''
    n: [emerg] unknown x in /etc/nginx/.c:3\nn: failed     => /etc/nginx/.c:3: unknown x
    n: [warn] a\nn: [emerg] no "x" in /etc/nginx/w.conf:9 => /etc/nginx/w.conf:9: no "x"
    2024/01/01 00:00:00 [emerg] 12#12: bind() failed       => bind() failed
    strange                                                => strange
    => nginx -t failed''')
def test_the_words_of_nginx_begin_with_file_and_line(err, said):
    for status, problem in ((1, said), (0, '')):
        host = Host('/nowhere', run=lambda argv: Result(status, '', err))
        assert host.nginx.problem() == problem

def test_nginx_is_asked_why_where_its_signal_has_no_effect(plain):
    """After a test that passed: what is lost meanwhile is mended as ever."""
    plain.lives(ONE_WEB)
    del plain.done[:]
    plain.broken['kill'] = 1
    plain.host.nginx.reload(is_tested=True)
    assert plain.done == ['kill -HUP 50', 'nginx -s reload']
    plain.broken.update({'kill': 1, 'nginx -s': 1})
    assert 'broken on purpose' in refusal(plain.host.nginx.reload, True)

def test_an_nginx_that_ends_before_its_signal_comes_has_not_followed(plain):
    plain.lives(ONE_WEB)

    def end(pid, number):
        shutil.rmtree(plain.host.path('/proc'))
        os.unlink(plain.host.path('/run/nginx.pid'))
        plain.broken['nginx -s'] = 1
    plain.host.signal = end
    assert 'broken on purpose' in refusal(plain.host.nginx.reload, True)

def test_where_nginx_does_not_run_nothing_is_drained(tmpdir):
    """As at boot after a power cut in the midst of a hand-over."""
    machine = Machine(tmpdir, 'systemd')
    half_deployed(machine, 2, (ONE_WEB, TWO_WEB))
    os.unlink(machine.host.path('/run/nginx.pid'))
    machine.state = 'starting'
    dh.cmd_recover(machine.host)
    assert machine.app.live().number == 1 and not machine.app.linked('pending')
    assert machine.running() == ['sha256:FROMone']
    assert machine.host.nginx.is_drained([('10.86.0.2', 80)])

def test_at_boot_nginx_is_left_to_start_once_dockhand_has_recovered(tmpdir):
    machine = Machine(tmpdir, 'systemd')
    machine.state = 'starting'
    machine.host.nginx.reload()
    assert machine.served is None
    machine.state = 'degraded'
    machine.host.nginx.reload()
    assert machine.served == {}

def test_an_nginx_that_does_not_start_is_told_with_its_last_complaint(plain):
    plain.broken['service nginx'] = 1
    plain.write('/var/log/nginx/error.log', 'x [notice] a\nx [emerg] bind() failed\nb\n')
    said = refusal(plain.host.nginx.reload)
    assert said == 'nginx does not start: x [emerg] bind() failed'

def test_a_proxy_file_that_has_changed_is_parsed_again_and_no_other(plain):
    shop, other = '/etc/nginx/conf.d/shop.conf', '/etc/nginx/sites-enabled/else'
    plain.write(other, 'server { server_name else; }')
    seen = []
    for name in 'abba':
        plain.write(shop, 'server { server_name %s; }' % name)
        files = plain.host.nginx.files()
        assert files[shop].servers[0].names == [name]
        seen.append((files[shop], files[other]))
    a, b, b_again, a_again = seen
    assert b[0] is b_again[0] and a[0] is a_again[0] and a[0] is not b[0]
    assert a[1] is b[1] is a_again[1]

def test_a_reload_counts_when_the_earlier_workers_have_gone(plain):
    plain.nginx()
    earlier, reload = plain.host.nginx.workers('50'), plain.nginx_s
    plain.nginx_s = lambda *words: threading.Timer(0.05, reload, words).start()
    plain.host.nginx.reload()
    assert earlier and not set(earlier) & set(plain.host.nginx.workers('50'))

def test_what_nginx_says_of_another_file_is_told_without_what_it_quotes(plain):
    with_wiki(plain)
    plain.write('/etc/nginx/.secret', '')
    secret = ('nginx: [emerg] unknown directive "PASSWORD=1" '
              'in /etc/nginx/conf.d/wiki.conf:1\n')
    plain.nginx_t = lambda *words: Result(1, '', secret)
    said = refusal(plain.push, FILES_2)
    assert said == ("nginx's configuration was broken before this push: "
                    '/etc/nginx/conf.d/wiki.conf:1: unknown directive "..."')

def test_the_workers_of_a_killed_master_are_ended_before_nginx_is_started(plain):
    plain.lives(FILES)
    # What a shell puts in the background ignores SIGQUIT, and so do its children.
    worker = subprocess.Popen(['sleep', '60'], preexec_fn=lambda: signal.signal(
        signal.SIGQUIT, signal.SIG_DFL))
    try:
        plain.process(worker.pid, 1, 'nginx: worker process')
        started = []
        plain.service = lambda *words: started.append(worker.poll()) or plain.nginx()
        os.unlink(plain.host.path('/run/nginx.pid'))
        threading.Timer(0.2, lambda: worker.wait() and shutil.rmtree(
            plain.host.path('/proc', str(worker.pid)))).start()
        dh.cmd_recover(plain.host)
        assert started == [-signal.SIGQUIT]
    finally:
        worker.poll() is None and worker.kill()

# ---- The two engines -------------------------------------------------------------------

# What keeps an app running: init by its job, docker by a policy.

def test_a_container_that_ignores_its_signal_is_stopped_too(tmpdir):
    machine = Machine(tmpdir, 'upstart')
    live = machine.lives(but('docker', 'FROM deaf'))
    dh.Upstart(machine.app).stop(live)
    assert machine.running() == []

NAMED = 'start on started docker\nexec docker run --rm --name blog-1 blog\n'
PUBLISHED = NAMED.replace('--name blog-1', '-p 127.0.0.1:8000:80')

def end_client(machine):
    """The container of which goes on."""
    machine.jobs.clear()

def end_client_early(machine):
    machine.jobs.clear()
    for each in machine.containers.values():
        each['State']['Running'] = False

@pytest.mark.parametrize('act', [dh.cmd_start, dh.cmd_restart,
                                 lambda app: dh.cmd_recover(app.host)],
                         ids=['start', 'restart', 'recover'])
@pytest.mark.parametrize('job, harm', [
    (NAMED, end_client), (PUBLISHED, end_client), (NAMED, end_client_early)])
def test_a_container_that_a_killed_client_left_is_no_obstacle(tmpdir, act, job, harm):
    machine = Machine(tmpdir, 'upstart')
    machine.lives(dict(FILES, **{'upstart.conf': job}))
    left = list(machine.containers)
    harm(machine)
    act(machine.app)
    assert list(machine.jobs) == ['blog'] and machine.running() == ['sha256:FROMone']
    assert len(machine.containers) == 1 and list(machine.containers) != left

@pytest.mark.parametrize('act', [
    lambda machine: machine.push(FILES_2, MAIN, SHA_2, SHA_3),
    lambda machine: dh.cmd_restart(machine.app),
    lambda machine: dh.cmd_rollback(machine.app),
    lambda machine: dh.cmd_config(machine.app, 'A=2')],
    ids=['push', 'restart', 'rollback', 'config'])
def test_a_running_job_whose_file_was_removed_is_changed_as_any_other(tmpdir, act):
    machine, twin = [Machine(tmpdir.join(name), 'upstart') for name in ('1', '2')]
    for each in (machine, twin):
        pushed(each, SHA_2)
    os.unlink(machine.host.path('/etc/init/blog.conf'))
    for each in (machine, twin):
        act(each)
    assert standing(machine) == standing(twin)

@each('name', 'one deaf')
def test_a_running_job_whose_file_was_removed_is_stopped_and_destroyed(tmpdir, name):
    for act in (dh.cmd_stop, dh.cmd_destroy):
        machine = Machine(tmpdir.join(act.__name__), 'upstart')
        machine.lives(but('docker', 'FROM ' + name))
        os.unlink(machine.host.path('/etc/init/blog.conf'))
        act(machine.app, *[True] * (act is dh.cmd_destroy))
        assert machine.running() == [] and machine.jobs == {}
    assert not [path for path in machine.files() if 'blog' in path]

@pytest.mark.parametrize('health', [None, 'healthy'])
@pytest.mark.parametrize('web, port, asked', [
    (True, 8000, [('10.86.0.2', 8000)]), (False, 5432, [('10.86.0.2', 5432)]),
    (False, None, [])])
def test_the_port_of_an_app_is_asked(plain, health, web, port, asked):
    asking = release(number=1, web=web, port=port, image='sha256:FROMone')
    plain.images['blog:1'] = image('FROM one\nHEALTHCHECK x' if health else 'FROM one')
    plain.app.save(asking)
    engine = dh.Containers(plain.app)
    engine.prepare(asking)
    engine.start(asking)
    found = engine.state(asking)        # a HEALTHCHECK knows better how a service is
    assert found.health == (health or '')
    assert found.ports == ([] if health and not web else asked)

def test_under_upstart_a_plain_app_wants_a_docker_that_can(tmpdir):
    machine = Machine(tmpdir, 'upstart')
    machine.lives(FILES)
    machine.docker_version = lambda _: 'Server version: 1.9.1\n'
    before = machine.whole()
    assert 'without an upstart.conf an app wants docker' in refusal(machine.push, TWO_WEB)
    assert machine.changed(before) == []

def test_docker_is_told_not_to_restart_a_container_before_it_is_stopped(plain):
    """And again afterwards where it refused: dockerd that dies between the two must not
    bring the old worker back beside the new one."""
    live = plain.lives(FILES)
    engine = dh.Containers(plain.app)
    plain.broken['docker update'] = 1
    engine.stop(live)
    assert plain.done == ['docker update --restart no blog--1',
                          'docker stop -t 5 blog--1',
                          'docker update --restart no blog--1']
    assert plain.containers['blog--1']['policy'] == 'no'
    del plain.done[:]
    engine.stop(live)
    assert len(plain.done) == 2

# ---- Health ----------------------------------------------------------------------------

# When a release may take over: it runs, it is ready, it stays up.

def tcp(machine, pid, name, row):
    """/proc/PID/net/tcp or tcp6 with one row: local and remote address, state."""
    machine.write('/proc/%s/net/%s' % (pid, name), """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid
   0: %s %s %s 00000000:00000000 00:00000000 00000000 0 0 1 1 0000 100
""" % row)

@pytest.mark.parametrize('address, state, ports', [
    ('0100007F', '0A', [8000]), ('00000000', '0A', []), ('0B00007F', '0A', []),
    ('0' * 24 + '01000000', '0A', [8000]), ('0' * 32, '0A', []),
    ('0000000000000000FFFF00000100007F', '0A', [8000]), ('0100007F', '01', [])])
def test_an_app_that_listens_for_itself_alone_is_told(plain, address, state, ports):
    tcp(plain, 77, 'tcp6' if len(address) > 8 else 'tcp',
        (address + ':1F40', '0' * len(address) + ':0000', state))
    open_ports = [8000] if state == '0A' and address.strip('0') == '' else []
    assert dh.listening_ports(plain.host, [77, None]) == (ports, open_ports)

def test_a_web_app_that_nobody_else_reaches_is_refused_with_the_reason(plain, capfd):
    plain.docker_network('network', 'create', '--subnet=127.86.0.0/16', 'dockhand')
    plain.nginx()
    start = plain.docker_start
    plain.docker_start = lambda *words: start(*words) or plain.containers['blog--1'][
        'State'].update(Pid=77)
    dh.cmd_config(plain.app, 'timeout=3')
    files = {'Dockerfile': 'FROM one\nEXPOSE 8000\n'}
    with a_listener('127.86.0.2') as port:
        dh.cmd_config(plain.app, 'port=%d' % port)
        plain.push(files, old=ZERO, new=SHA)
    assert plain.running() == ['sha256:FROMone']
    said = refusal(lambda: plain.push({'Dockerfile': 'FROM two\nEXPOSE 8000\n'}))
    assert re.search(r'after 3 s nothing listens on port \d+ of the container', said)
    assert plain.running() == ['sha256:FROMone']
    capfd.readouterr()
    tcp(plain, 77, 'tcp', ('0100007F:1F40', '00000000:0000', '0A'))
    live = plain.app.live()
    refusal(dh.check_or_show_log, plain.app, live)
    assert ('-----> It listens on 127.0.0.1:8000 alone: make it listen on 0.0.0.0\n'
            ) in capfd.readouterr().err

@contextmanager
def a_listener(address):
    listener = socket.socket()
    listener.bind((address, 0))
    listener.listen(50)
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()

class Page(object):
    """What answers at some address: `answers` one after the other, the last for ever."""
    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, place, timeout, tls_name=None):
        self.place = place
        return self

    def sendall(self, data):
        self.asked.append((self.place, dh.to_text(data).split('\r\n')[:2]))
        answers = self.answers
        answer = answers.pop(0) if answers[1:] else answers[0]
        if answer is None:
            raise socket.timeout('timed out')
        self.left = dh.to_bytes(answer)

    def recv(self, size):
        data, self.left = self.left[:7], self.left[7:]
        return data

    def settimeout(self, seconds):
        assert seconds > 0

    def close(self):
        pass

@pytest.mark.parametrize('answers, said', [
    (['HTTP/1.1 200 OK\r\n\r\nfine'], None), (['HTTP/1.0 302 Found\r\n\r\n'], None),
    (['HTTP/1.1 204 x\r\n\r\n'], None),
    (['HTTP/1.1 500 Oh\r\n\r\n\r\n no database\nmore'] * 3,
     'GET /up answers 500, no database'),
    (['HTTP/1.1 404 x\r\n\r\n'], 'GET /up answers 404'),
    (['HTTP/1.1 503 x\r\nA: b\r\n\r\n\x1b[31mred' + 'x' * 400], 'GET /up answers 503, ?[31m'),
    (['SSH-2.0'], 'GET /up answers nothing'), ([''], 'GET /up answers nothing'),
    ([None], 'GET /up: timed out'), (['HTTP/1.1 100 x\r\n\r\n'], 'GET /up answers 100'),
    (['HTTP/1.1 503 x\r\n\r\n', 'HTTP/1.1 503 x\r\n\r\n', 'HTTP/1.1 200 x\r\n\r\n'], None)])
def test_a_page_is_checked_until_it_is_there(answers, said):
    page, clock = Page(*answers), Clock()
    engine = Engine(state(ports=[('10.86.0.2', 8000)]))
    engine.host = Host(clock=clock, connect=page)
    app = release(config={'check': '/up', 'domains': 'b.example.org'}, addresses=['10.86.0.2'])
    if said is None:
        dh.check_health(app, engine, 9, 2)
        assert len(page.asked) == len(answers)  # what is well is not asked again
    else:
        why = refusal(dh.check_health, app, engine, 3, 2)
        assert why.startswith('after 3 s ' + said) and why.endswith(LONGER)
    assert page.asked[0] == (('10.86.0.2', 8000), ['GET /up HTTP/1.1', 'Host: blog'])

def test_each_web_process_is_asked_by_its_address_and_the_first_full_name():
    page = Page('HTTP/1.1 200 OK\r\n\r\n')
    proxy = 'server { listen 80; server_name blog b.example.org c.example.org; }'
    app = release(config={'check': '/', 'scale': 'web=2'}, proxy=proxy,
                  procfile='web: a\nworker: b\n', addresses=['10.86.0.2', '10.86.0.3'])
    places = [('10.86.0.2', 8000), ('10.86.0.3', 8000)]
    assert dh.page_problem(Host(connect=page), app, places, 9) == ''
    assert page.asked == [(place, ['GET / HTTP/1.1', 'Host: b.example.org'])
                          for place in places]
    assert dh.page_problem(Host(connect=page), app, [], 9) == ''
    assert dh.page_problem(Host(connect=page), app._replace(config={}), places, 9) == ''
    assert len(page.asked) == 2

class Engine(object):
    """Gives its states one after the other, the last one for ever."""
    def __init__(self, *states):
        self.states, self.asked, self.host = list(states), 0, Host()

    @contextmanager
    def watched(self, release, is_first):
        yield self.state

    def state(self, release=None):
        self.asked += 1
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

def state(alive=True, identity=1, ports=(), health=''):
    return dh.State(alive, identity, list(ports), health, 'exited with 1')

def unwell(engine, timeout=9, steady=9):
    return refusal(dh.check_health, release(), engine, timeout, steady)

LONGER = ' (config timeout=N gives it more time)'

def test_an_app_that_does_not_run_fails_without_waiting():
    engine = Engine(state(alive=False))
    assert unwell(engine) == 'it does not run: exited with 1' and engine.asked == 1

def test_an_app_that_is_unhealthy_fails_without_waiting():
    engine = Engine(state(health='starting'), state(health='unhealthy'))
    assert 'unhealthy' in unwell(engine) and engine.asked == 2

def test_an_app_that_keeps_being_started_anew_fails():
    engine = Engine(*[state(identity=number) for number in range(9)])
    assert 'keeps dying' in unwell(engine) and engine.asked < 9

def test_an_app_must_keep_running_under_one_identity():
    engine = Engine(state(None, None), state(True, 1), state(True, 1), state(True, 2))
    dh.check_health(release(), engine, 9, 1)
    assert engine.asked >= 5

@pytest.mark.parametrize('found, said', [
    (state(None), 'after 0 s it is not running yet'),
    (state(), 'after 0 s it is not running yet'),
    (state(health='starting'), 'after 0 s its HEALTHCHECK is still starting')])
def test_an_app_that_is_not_ready_in_time_fails_with_the_reason(found, said):
    assert unwell(Engine(found), timeout=0) == said + LONGER

def test_between_two_looks_that_take_long_docker_has_a_rest():
    engine = Engine(state(None), state(None), state())
    engine.host, look = Host(clock=Clock()), engine.state

    def look_long():
        engine.host.clock.sleep(0.4)
        return look()
    engine.state = look_long
    begun = engine.host.clock.monotonic()
    dh.check_health(release(), engine, 9, 0)
    assert engine.host.clock.monotonic() - begun > 3 * 0.4 + 2 * 0.04

def test_an_app_answers_when_each_port_takes_a_connection():
    listener, closed = socket.socket(), socket.socket()
    for each in (listener, closed):
        each.bind(('127.0.0.1', 0))
    listener.listen(5)
    port, silent = listener.getsockname(), closed.getsockname()
    dh.check_health(release(), Engine(state(ports=[port])), 9, 0)
    assert 'nothing listens on port %d of the container' % silent[1] in unwell(
        Engine(state(ports=[port, silent])), 0, 0)
    assert unwell(Engine(state(ports=[silent], health='healthy')), 0, 0).startswith(
        'after 0 s nothing listens on port')
    dh.check_health(release(), Engine(state(ports=[port], health='healthy')), 9, 0)
    closed.close()
    listener.close()

# ---- The store -------------------------------------------------------------------------

# Releases as they are written down, by this dockhand and by earlier ones.

# What each way to write a release down was first written by (a commit), the keys of its
# release.json, the first line of its proxy file, and whether a ref of its own holds the
# commit. Only then came `seconds`: before, a record without `failed` is of a release that
# was built, and was live or is what `pending` points to.
OLDEST = 'app number commit branch key time image'
ERAS = {
    '5e9521c': (
        OLDEST, "# dockhand: blog's, installed from its repository at each push\n",
        False),
    '1535d37': (OLDEST, PROXY_HEADER, False),
    'e130873': (OLDEST + ' seconds failed', PROXY_HEADER, True),
    '5d7cafb': (OLDEST + ' seconds failed config port web volumes address',
                PROXY_HEADER, True),
    'fa6cd42': (OLDEST + ' seconds failed turn config port web volumes address',
                PROXY_HEADER, True)}
RECORD = '/var/lib/dockhand/apps/blog/releases/%d/release.json'
in_each_era = pytest.mark.parametrize('era', [
    '5e9521c', '1535d37', 'e130873', '5d7cafb', 'fa6cd42'])

def write_down_again(machine, number, era, **changes):
    """Make a release's folder what a dockhand of that era would have written."""
    keys, header, has_ref = ERAS[era]
    path = RECORD % number
    record = dict(json.loads(machine.read(path)), **changes)
    record.setdefault('key', record.get('by'))
    record.setdefault('address', ''.join(record.get('addresses', [])[:1]))
    machine.write(path, json.dumps(dict((key, record[key]) for key in keys.split())))
    folder = os.path.dirname(path)
    proxies = [folder + '/nginx-proxy.conf']
    if number == machine.app.live().number:
        proxies.append('/etc/nginx/conf.d/blog.conf')
    for path in proxies:
        machine.write(path, machine.read(path).replace(PROXY_HEADER, header))
    if 'config' not in keys:
        dh.remove_file(machine.host.path(folder, 'env'))
    if not has_ref:
        machine.refs.pop('refs/dockhand/%d' % number, None)

def store_of(machine, era):
    """Release 1, kept, and 2, live, as a dockhand of that era left them."""
    pushed(machine, SHA_2)
    machine.host.nginx.restore('blog', machine.app.load(2).proxy)
    for number in (1, 2):
        write_down_again(machine, number, era)
    del machine.done[:]

def listed(machine, capfd):
    """{number: what `releases` says became of it}."""
    capfd.readouterr()
    dh.cmd_releases(machine.app)
    rows = [re.sub(' again since .*: rollback by root', ' again', line)
            for line in capfd.readouterr().out.splitlines()]
    return dict((int(line.split()[0]), re.split(r' s  |-  ', line, maxsplit=1)[1].strip())
                for line in rows)

@in_each_era
def test_a_release_of_an_earlier_dockhand_is_read_whole(machine, era):
    store_of(machine, era)
    for number, commit, name in ((1, SHA, 'one'), (2, SHA_2, '222')):
        found = machine.app.load(number)
        assert found.seconds is not None, 'it looks as if it were still under way'
        assert found.job.startswith(JOB_HEADER) and dh.is_ours(found.proxy, 'blog')
        assert found == release(
            number=number, commit=commit, seconds=found.seconds, turn=found.turn,
            image='sha256:FROM' + name, job=found.job, proxy=found.proxy, **OF_A_JOB)
    assert machine.app.live().number == 2

@in_each_era
def test_recover_leaves_what_an_earlier_dockhand_kept(machine, era):
    store_of(machine, era)
    before, files = machine.whole(), machine.files('/run')
    dh.cmd_recover(machine.host)
    assert machine.changed(before) == []
    now = machine.files('/run')
    assert sorted(path for path in set(files) | set(now)
                  if files.get(path) != now.get(path)) == []

@in_each_era
def test_a_rollback_goes_to_what_an_earlier_dockhand_kept_and_back(machine, era, capfd):
    store_of(machine, era)
    dh.cmd_rollback(machine.app)
    assert machine.running() == ['sha256:FROMone'] and machine.refs[MAIN] == SHA
    assert listed(machine, capfd) == {2: 'kept', 1: 'live again'}
    dh.cmd_rollback(machine.app)
    assert machine.running() == ['sha256:FROM222'] and machine.refs[MAIN] == SHA_2
    for number in (1, 2):       # not the years since it was pushed
        assert machine.app.load(number).seconds < 60

@in_each_era
def test_a_push_after_an_earlier_dockhand_keeps_what_that_kept(machine, era, capfd):
    store_of(machine, era)
    machine.push(but('docker', 'FROM 333'), MAIN, SHA_2, SHA_3)
    dh.after_push(machine.app, None)
    assert listed(machine, capfd) == {3: 'live', 2: 'kept', 1: 'kept'}
    assert sorted(machine.images) == ['blog:1', 'blog:2', 'blog:3', 'blog:latest']

# How a release that failed was written down: it has lost its job and proxy file.
FAILED = {
    '5e9521c': 'number commit key time failed',
    '1535d37': OLDEST + ' failed',              # whether its image was built or not
    '38ba639': OLDEST + ' failed',              # before the build, in case that is killed
    'e130873': OLDEST + ' seconds failed'}

@pytest.mark.parametrize('era, image', [('5e9521c', None), ('1535d37', 'sha256:FROMdies'),
                                        ('38ba639', None), ('e130873', None)])
def test_what_failed_with_an_earlier_dockhand_stays_failed(machine, capfd, era, image):
    store_of(machine, '5e9521c')
    record = {'app': 'blog', 'number': 3, 'commit': SHA_3, 'branch': 'main',
              'key': 'anna', 'time': 1, 'image': image, 'seconds': None,
              'failed': 'interrupted'}
    machine.write(RECORD % 3, json.dumps(
        dict((key, record[key]) for key in FAILED[era].split())))
    dh.cmd_recover(machine.host)
    assert listed(machine, capfd) == {3: 'failed: interrupted', 2: 'live', 1: 'kept'}
    assert 'no release 3 to go back to' in refusal(dh.cmd_rollback, machine.app, '3')
    machine.push(but('docker', 'FROM 444'), MAIN, SHA_2, SHA_3)
    assert machine.app.live().number == 4

@in_each_era
def test_what_an_earlier_dockhand_was_switching_to_is_put_back_and_forgotten(
        machine, era, capfd):
    """The new dockhand is installed over a crash: `pending` says what never was live."""
    store_of(machine, era)
    new = machine.release(3, SHA_3, but('docker', 'FROM 333'))
    engine = dh.engine_of(machine.app, new)
    live = machine.app.live()
    engine.prepare(new)
    machine.app.set_link('pending', new)
    for act in switch_steps(machine.host, live, new):
        act()
    write_down_again(machine, 3, era)
    dh.cmd_recover(machine.host)
    assert machine.running() == ['sha256:FROM222']
    assert listed(machine, capfd) == {3: 'failed: interrupted', 2: 'live', 1: 'kept'}
    assert 'blog:3' not in machine.images

@in_each_era
def test_a_crash_after_an_earlier_dockhand_committed_keeps_its_release(
        machine, era, capfd):
    store_of(machine, era)
    live = machine.app.live()
    machine.app.set_link('pending', live)
    if 'seconds' in ERAS[era][0]:
        write_down_again(machine, 2, era, seconds=None)
    dh.cmd_recover(machine.host)
    assert machine.running() == ['sha256:FROM222']
    assert listed(machine, capfd) == {2: 'live', 1: 'kept'}
    assert not os.path.lexists(machine.host.path('/var/lib/dockhand/apps/blog/pending'))

def test_order_is_a_counter_whatever_the_times_of_folders_say(plain):
    """A clock that was ahead, or a copy of the store without its times."""
    pushed(plain, SHA_2)
    for number, commit in ((3, SHA_3), (4, '4' * 40)):
        plain.push(but('docker', 'FROM ' + commit[:3]), old=plain.refs[MAIN], new=commit)
    for number, when in ((1, 4e9), (2, 3e9), (3, 1), (4, 2)):
        os.utime(plain.app.release_folder(number), (when, when))
    assert [each.number for each in plain.app.kept()] == [4, 3, 2, 1]
    dh.cmd_rollback(plain.app, '2')
    assert [each.number for each in plain.app.kept()] == [2, 4, 3, 1]
    dh.cmd_rollback(plain.app)
    assert [each.number for each in plain.app.kept()] == [4, 2, 3, 1]

def test_live_is_what_the_link_says_where_a_crash_came_before_it(plain):
    pushed(plain, SHA_2)
    live = plain.app.live()
    plain.app.count_turn(live, plain.app.load(1))
    assert [each.number for each in plain.app.kept()] == [2, 1]

# ---- Switching -------------------------------------------------------------------------

# From one release to the other: in which order, and back if anything fails.

BUILD = '''mkdir /var/lib/dockhand/build/blog
nginx -t -q -c /etc/nginx/.blog.conf.new
docker build --force-rm -t blog:2 /var/lib/dockhand/build/blog
rm -rf -- /var/lib/dockhand/build/blog
'''
ORDER = {'none': BUILD + '''docker create --name blog--2 --label=dockhand.app=blog --log-driver=json-file \
--log-opt=max-size=10m --log-opt=max-file=3 --pids-limit=4096 sha256:FROMtwo
docker update --restart no blog--1
docker stop -t 5 blog--1
kill -HUP 50
docker start blog--2
docker tag blog:2 blog:latest
docker update --restart always blog--2''', 'upstart': BUILD + '''stop blog
docker tag blog:2 blog:latest
kill -HUP 50
timeout 60 start blog'''}

def test_a_deploy_stops_tags_starts_and_reloads_in_this_order(machine, capfd):
    machine.lives(FILES)
    machine.push(FILES_2)
    assert '\n'.join(machine.done) == ORDER[machine.init]
    assert machine.running() == ['sha256:FROMtwo']
    assert machine.images['blog:latest']['Id'] == 'sha256:FROMtwo'
    proxy = PROXY_HEADER + FILES_2['nginx-proxy.conf']
    assert machine.served == {'/etc/nginx/conf.d/blog.conf': proxy}
    if machine.init == 'upstart':
        assert machine.read('/etc/init/blog.conf') == JOB_HEADER + FILES_2['upstart.conf']
    live = machine.app.live()
    assert (live.number, live.commit, live.branch, live.by, live.image, live.proxy) == (
        2, SHA_2, 'main', 'anna', 'sha256:FROMtwo', proxy)
    assert not re.search(r'pending|override|build/blog|\.new', str(machine.files()))
    said = capfd.readouterr().err
    assert re.findall('-----> (.*)', re.sub(r'\d\.\d s', 'N s', said)) == [
        'Checking 2222222222', 'Building blog:2', 'Switching to release 2',
        'Release 2 is live: built in N s, switched in N s, checked in N s, down for N s']
    assert '\n       image: 5.0 MB\n' in said
    assert '       Step 1/1 : FROM two\n' in said

# What an act does, of which kind of app, and at which of its commands it may fail.
FAILURES = [(act, kind, command) for act, kind, commands in map(cells, '''
    first => none => mkdir, nginx -t, docker build, docker create, docker tag, kill
    first => none => docker start
    first => none web => mkdir, docker build, nginx -t, docker network create
    first => none web => docker create, docker tag, kill, docker start, docker rm
    first => none data => mkdir, docker build, nginx -t, docker network create
    first => none data => docker create, docker tag, kill, docker start, docker rm
    first => upstart => mkdir, nginx -t, docker build, docker tag, kill
    first => upstart => timeout 60 start
    deploy => none => mkdir, nginx -t, docker build, docker create, docker stop
    deploy => none => docker tag, kill, docker start
    deploy => none web => mkdir, docker build, docker run
    deploy => none web => kill, docker tag
    deploy => none data => mkdir, docker build, nginx -t, docker create, docker stop
    deploy => none data => docker tag, kill, docker start
    deploy => upstart => mkdir, nginx -t, docker build, stop, docker tag, kill
    deploy => upstart => timeout 60 start
    deploy => upstart turned => mkdir, docker build, nginx -t, docker network create
    deploy => upstart turned => docker create, stop, docker tag, kill, docker start
    rollback => none => nginx -t, docker stop, docker tag
    rollback => none => kill, docker start
    rollback => none web => docker start, kill, docker tag
    rollback => none data => nginx -t, docker stop, docker tag, kill, docker start
    pruned => none => docker create
    pruned => none web => docker create
    pruned => none data => docker create
    turned on => none => docker update
    turned on => none web => docker update
    rollback => upstart => nginx -t, stop, docker tag, kill, timeout 60 start
    rollback => upstart turned => nginx -t, docker stop, docker tag, kill
    rollback => upstart turned => timeout 60 start
    config => none => docker tag, docker create, docker stop, docker start
    config => none web => docker tag, docker run, kill
    config => none data => docker tag, nginx -t, docker create, docker stop, kill
    config => none data => docker start
    config => upstart => docker tag, stop, timeout 60 start'''.strip().splitlines())
            for command in commands.split(', ')]

# What may have become of the container that a rollback goes to
KEPT = {'rollback': lambda machine: None,
        'pruned': lambda machine: machine.containers.pop('blog--1'),
        'turned on': lambda machine: machine.containers['blog--1'].update(policy='always')}

@pytest.mark.parametrize('act, kind, command', FAILURES)
def test_what_fails_at_any_command_is_put_back_and_can_be_tried_again(
        tmpdir, act, kind, command):
    become = KEPT.get(act)
    if become:
        act = 'rollback'
    machine = about_to(act, kind, str(tmpdir))
    if become:
        become(machine)
    before, live = machine.whole(), machine.app.live()
    last = max([0] + machine.app.numbers())
    del machine.done[:]
    for number in (last + 1, last + 2):
        machine.broken[command] = 1
        machine.broken['nginx -s'] = int(command == 'kill')     # it is asked why not
        said = refusal(ACTS[act], machine)
        assert 'broken on purpose' in said or command == 'docker build'
        # a rollback may leave what it had made of the older release, stopped
        left = ['blog--1'] if act == 'rollback' else records_of(last + 1, last + 2)
        assert set(machine.changed(before)) <= set(left)
        if act != 'rollback':
            record = machine.app.load(number)
            assert (record.failed, record.seconds) == (said, None)
    if live and kind == 'none web':         # it answers all the time
        assert 'docker stop -t 10 blog--%d' % live.number not in machine.done
    ACTS[act](machine)
    now = machine.app.live()
    assert now != live and machine.running() == [now.image]
    assert act != 'config' or machine.app.config()['A'] == '2'

@table('become, first', '''
    pruned    => docker create --name blog--1
    turned on => docker update --restart no blog--1''')
@each('overlap', 'yes no')
def test_a_rollback_makes_ready_what_it_goes_to_before_anything_stops(
        plain, become, first, overlap):
    plain.lives(ONE_WEB, overlap=overlap)
    plain.push(TWO_WEB)
    KEPT[become](plain)
    del plain.done[:]
    dh.cmd_rollback(plain.app)
    acts = [line for line in plain.done
            if re.match('docker (create|update|stop|start|run)', line)]
    made = [line for line in acts if line.startswith(first)]
    stops = [line for line in acts if re.match('docker (stop|start)', line)]
    assert acts.index(made[0]) < acts.index(stops[0])
    assert plain.running() == ['sha256:FROMone']
    assert plain.containers['blog--2']['policy'] == 'no'

def test_what_nginx_refuses_of_a_made_file_is_put_back_though_the_new_one_runs(plain):
    """It is asked beside the start: the old release goes on."""
    plain.lives(ONE_WEB)
    before = plain.whole()
    plain.broken['nginx -t'] = 9
    assert 'broken on purpose' in refusal(plain.push, TWO_WEB)
    plain.broken.clear()
    assert set(plain.changed(before)) <= records_of(2)
    assert not [line for line in plain.done if re.match('docker stop.* blog--1', line)]
    plain.push(TWO_WEB, old=SHA, new='3' * 40)
    assert plain.running() == ['sha256:FROMtwo']

@pytest.mark.parametrize('files, config', [
    (TWO_WEB, {'overlap': 'no'}), (TWO_WEB, {'release': 'up'}), (FILES_2, {}),
    (TWO_NAMED, {})])
def test_nginx_is_asked_before_a_release_command_or_a_gap_and_of_what_was_pushed(
        plain, files, config):
    plain.lives(ONE_WEB, **config)
    del plain.done[:]
    plain.broken['nginx -t'] = 9
    assert 'broken on purpose' in refusal(plain.push, files)
    assert not [line for line in plain.done if re.match('docker (run|create)', line)]

def test_a_push_that_leaves_its_proxy_file_as_it_is_is_refused_where_nginx_is_broken(
        machine):
    machine.lives(FILES)
    machine.broken['nginx -t'] = 9
    assert "nginx's configuration was broken before this push" in refusal(
        machine.push, dict(FILES_2, **{'nginx-proxy.conf': FILES['nginx-proxy.conf']}))

def test_what_was_written_by_hand_and_is_pushed_then_is_tested(machine):
    """It lies there already, and nginx may never have read it."""
    machine.lives(FILES)
    by_hand = FILES['nginx-proxy.conf'].replace('listen 80', 'listen  80')
    machine.write('/etc/nginx/conf.d/blog.conf', PROXY_HEADER + by_hand)
    machine.broken['nginx -t'] = 9
    assert 'broken on purpose' in refusal(machine.push, dict(
        FILES_2, **{'nginx-proxy.conf': by_hand}))

def test_workers_are_exchanged_once_nginx_has_said_yes(plain):
    plain.lives(ONE_TYPES)
    del plain.done[:]
    plain.broken['nginx -t'] = 9
    assert 'broken on purpose' in refusal(plain.push, TWO_TYPES)
    assert not [line for line in plain.done
                if re.match('docker (create|run|stop|start)', line)]

def test_a_full_disk_is_found_before_anything_is_switched_to(plain):
    plain.lives(ONE_WEB)
    before = plain.whole()
    plain.host.docker.check_takes_writes = lambda name: dh.refuse_if(True, 'full')
    assert refusal(plain.push, TWO_WEB) == 'full'
    assert not plain.app.linked('pending')
    assert not [line for line in plain.done if re.match('docker (create|run)', line)]
    assert set(plain.changed(before)) <= records_of(2)

@table('parent, command, is_ended', '''
    1  => docker run --name blog--2 --net=dockhand x   => yes
    9  => docker run --name blog--2 --net=dockhand x   => no
    1  => docker run --name blog--22 --net=dockhand x  => no
    1  => docker run --rm --name blog--2 x             => no
    1  => docker start blog--2                         => no
    1  => docker run --name                            => no
    1  => docker                                       => no
    1  =>                                              => no''')
def test_a_run_that_goes_on_alone_after_a_kill_is_ended(
        plain, monkeypatch, parent, command, is_ended):
    half_deployed(plain, 1, (ONE_WEB, TWO_WEB))
    plain.write('/proc/4321/stat', '4321 (docker) S %s 4321' % parent)
    plain.write('/proc/4321/cmdline', command.replace(' ', '\0') + '\0')
    ended = []

    def kill(pid, number):
        ended.append((pid, number))
        raise OSError(errno.ESRCH, 'No such process')       # it has just come to its end
    monkeypatch.setattr(os, 'kill', kill)
    dh.cmd_recover(plain.host)
    assert ended == [(4321, signal.SIGKILL)] * (is_ended == 'yes')
    assert plain.app.live().number == 1

def test_an_app_that_dies_at_once_is_put_back_with_the_end_of_its_log(machine, capfd):
    machine.lives(FILES)
    before = machine.whole()
    said = refusal(machine.push, but('docker', 'FROM dies'))
    assert said.startswith('release 2 failed its health check: it does not run: ')
    assert machine.changed(before) == []
    err = capfd.readouterr().err
    assert '       its last words\n' in err
    assert err.endswith('-----> Release 1 runs as before\n')

def test_of_a_log_only_what_came_since_this_start_is_shown(plain, capfd):
    live, asked = plain.lives(ONE_WEB), []
    plain.docker_logs = lambda *words: asked.append(words)
    for act in (lambda: plain.push(an_app('dies')), lambda: dh.cmd_start(plain.app)):
        before = plain.host.clock.time()
        plain.containers['blog--1']['Image'] = 'dies'
        plain.docker_stop('stop', '-t', '1', 'blog--1')
        assert 'failed its health check' in refusal(act)
        logs, tail, lines, since, name = asked.pop()
        assert (logs, tail, lines) == ('logs', '--tail', '20')
        moment = re.match(r'--since=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.\d{3}Z\Z', since)
        begun = calendar.timegm(time.strptime(moment.group(1), '%Y-%m-%dT%H:%M:%S'))
        assert before - 1 < begun <= plain.host.clock.time()

@pytest.mark.parametrize('earlier', [None, '', 'of release 1\n' * 50])
@pytest.mark.parametrize('lines', [1, 19, 20, 21, 500])
def test_of_a_jobs_log_only_what_came_since_this_start_is_shown(
        tmpdir, capfd, earlier, lines):
    machine = Machine(tmpdir, 'upstart')
    machine.lives(FILES)
    path, start = machine.host.path('/var/log/upstart/blog.log'), machine.start
    if earlier is not None:
        machine.write('/var/log/upstart/blog.log', earlier)
    machine.tail = lambda *words: [
        machine.each(line) for line in dh.execute(('tail',) + words).out.splitlines()][:0]

    def speaks(app):
        dh.make_folder(os.path.dirname(path))
        with open(path, 'a') as log:
            log.write(''.join('line %d\n' % number for number in range(lines)))
        return start(app)
    machine.start = speaks
    assert 'does not run' in refusal(machine.push, but('docker', 'FROM dies'))
    shown = re.findall('(?m)^       (line .*|of release 1)$', capfd.readouterr().err)
    assert shown == ['line %d' % number for number in range(lines)][-20:]

@pytest.mark.parametrize('init, files, volumes', [
    ('none', but('docker', 'FROM dies'), []), ('upstart', but('docker', 'FROM dies'), []),
    ('none', an_app('dies', 'EXPOSE 80\nVOLUME /x'), ['blog--x'])])
def test_a_first_release_that_dies_at_once_leaves_nothing_but_why_and_its_data(
        tmpdir, init, files, volumes):
    machine = about_to('first', init, str(tmpdir))
    before = machine.whole()
    for number in (1, 2):
        said = refusal(lambda: machine.push(files, old=ZERO))
        assert 'it does not run' in said
        assert set(machine.changed(before)) <= records_of(1, 2)
        assert machine.app.load(number).failed == said
    assert machine.volumes == volumes

def test_what_cannot_be_put_back_is_told_and_recover_mends_it_later(machine, capfd):
    machine.lives(FILES)
    before = machine.whole()
    machine.broken.update({'docker start': 9, 'timeout 60 start': 9})
    assert refusal(machine.push, FILES_2)
    err = capfd.readouterr().err
    assert 'dockhand: could not be put back: ' in err
    assert err.endswith('dockhand: mend that, then: sudo dockhand recover\n')
    assert machine.app.linked('pending').number == 2
    assert machine.running() == []
    machine.broken.clear()
    dh.cmd_recover(machine.host)
    assert machine.changed(before) == []
    assert 'blog: the switch to release 2 was interrupted' in capfd.readouterr().err

def test_what_was_put_back_but_is_not_well_is_told_and_leaves_nothing_to_do(plain, capfd):
    plain.lives(FILES)
    start = plain.docker_start
    plain.docker_start = lambda *words: start(*words) or plain.containers['blog--1'][
        'State'].update(Health={'Status': 'unhealthy'})
    assert 'does not run' in refusal(plain.push, but('docker', 'FROM dies'))
    assert ('dockhand: release 1 was started again, but: its HEALTHCHECK says unhealthy'
            in capfd.readouterr().err)
    assert plain.app.linked('pending') is None

@pytest.mark.parametrize('init, files, dying', [
    ('none', FILES, but('docker', 'FROM dies')),
    ('upstart', FILES, but('docker', 'FROM dies')), ('none', ONE_WEB, an_app('dies'))])
def test_a_stopped_app_stays_stopped_when_a_push_fails(tmpdir, init, files, dying):
    machine = Machine(tmpdir, init)
    machine.lives(files)
    dh.cmd_stop(machine.app)
    before = machine.whole()
    assert refusal(machine.push, dying)
    assert machine.changed(before) == [] and machine.running() == []

@pytest.mark.parametrize('init', ['none', 'upstart'])
def test_nothing_is_stopped_where_dockers_disk_takes_no_write(tmpdir, init):
    machine = Machine(tmpdir, init)
    machine.lives(FILES)
    before, build = machine.whole(), machine.docker_build

    def fill_the_disk(*words):
        """What is written to this device finds no space left."""
        os.symlink('/dev/full', machine.host.docker.trial_file('blog'))
        return build(*words)
    machine.docker_build = fill_the_disk
    said = refusal(machine.push, FILES_2)
    assert said.startswith('docker could start nothing: ') and 'No space left' in said
    assert machine.changed(before) == []
    assert not [line for line in machine.done if line.startswith(('docker stop', 'stop'))]

# ---- Switching plain apps --------------------------------------------------------------

# Handed over, or stopped and started.

def docker_acts(machine):
    """What docker was told to start and stop, in their order, and nginx's reloads."""
    return [re.sub(' -t [0-9]+', '', line[len('docker '):]) if line[0] == 'd' else 'nginx'
            for line in map(without_options, machine.done)
            if re.match('docker (run|start|stop|update)|kill', line)]

def without_options(line):
    """A `docker run` with the container's name alone."""
    return re.sub(r'^docker run --name (\S+).* --detach .*', r'docker run \1', line)

def test_the_new_workers_start_when_the_old_ones_are_stopped_and_then_nginx_turns(plain):
    plain.lives(ONE_TYPES)
    plain.push(TWO_TYPES)
    assert docker_acts(plain) == [
        'run blog--2', 'update --restart no blog--1--worker', 'stop blog--1--worker',
        'start blog--2--worker', 'nginx',
        'update --restart always blog--2 blog--2--worker', 'nginx',
        'update --restart no blog--1 blog--1--worker', 'stop blog--1 blog--1--worker']
    assert [plain.containers[name]['command'] for name in ('blog--2', 'blog--2--worker')
            ] == [['serve'], ['work', 'two']]
    dh.cmd_rollback(plain.app)
    assert sorted(name for name, each in plain.containers.items()
                  if each['State']['Running']) == ['blog--1', 'blog--1--worker']

def test_a_worker_that_dies_is_put_back_with_the_whole_release_and_its_log_shown(
        plain, capfd):
    live = plain.lives(ONE_TYPES)
    before = plain.whole()
    dying = dict(TWO_TYPES, Procfile='web: serve\nworker: work dies\n')
    assert refusal(plain.push, dying) == (
        'release 2 failed its health check: it does not run: worker exited with 1')
    assert plain.changed(before) == [] and plain.app.live() == live
    assert plain.containers['blog--1--worker']['policy'] == 'always'
    assert plain.containers['blog--1--worker']['State']['Running']
    assert [line for line in docker_acts(plain) if line.startswith(('run', 'start'))] == [
        'run blog--2', 'start blog--2--worker', 'start blog--1',
        'start blog--1--worker']
    assert 'The last lines of the log of worker:\n       its last words' in (
        capfd.readouterr().err)

def test_a_type_that_has_gone_from_the_procfile_goes_with_the_old_release(plain, capfd):
    plain.lives(ONE_TYPES, scale='worker=2')
    plain.push(dict(TWO_TYPES, Procfile='web: serve\n'))
    assert docker_acts(plain)[:3] == [
        'run blog--2', 'update --restart no blog--1--worker blog--1--worker--2',
        'stop blog--1--worker blog--1--worker--2']
    assert plain.running() == ['sha256:FROMtwo']
    assert 'Note: scale counts worker, and there is no such process, but web' in (
        capfd.readouterr().err)

def test_processes_are_counted_by_config_and_each_web_is_a_server_of_the_upstream(
        plain, capfd):
    plain.lives(ONE_TYPES)
    dh.cmd_config(plain.app, 'scale=web=2 worker=3')
    assert sorted(name for name, each in plain.containers.items()
                  if each['State']['Running']) == [
        'blog--2', 'blog--2--2', 'blog--2--worker', 'blog--2--worker--2',
        'blog--2--worker--3']
    assert ('upstream blog {\n    server 10.86.0.3:8000;\n    server 10.86.0.4:8000;\n'
            in plain.served['/etc/nginx/conf.d/blog.conf'])
    capfd.readouterr()
    dh.cmd_apps(plain.host)
    assert capfd.readouterr().out.rstrip().endswith('/  web=2 worker=3')
    plain.containers['blog--2--worker--2']['State'].update(Running=False, ExitCode=137)
    dh.cmd_apps(plain.host)
    out = capfd.readouterr().out
    assert ' DOWN ' in out and '  worker.2 exited with 137  web=2' in out
    dh.cmd_recover(plain.host)
    assert plain.containers['blog--2--worker--2']['State']['Running']
    dh.cmd_stop(plain.app)
    assert not any(each['State']['Running'] for each in plain.containers.values())
    dh.cmd_start(plain.app)
    dh.cmd_restart(plain.app)
    assert len(plain.running()) == 5
    dh.cmd_destroy(plain.app, force=True)
    assert plain.containers == {}

@pytest.mark.parametrize('words, said', [
    (['scale=worker=2 x=1'], 'scale counts x, and there is no such process, but web'),
    (['scale=web=0'], 'scale: without a web process nothing answers; to stop an app'),
    (['scale=web'], 'scale=web: how many of which process is wanted, up to 99, as web=2 worker=3'),
    (['scale=web=1 web=2'], 'scale=web=1 web=2: how many'),
    (['scale=web=100'], 'scale=web=100: how many'),
    (['scale='], 'scale=: how many'), (['scale=web=01'], 'how many of which'),
    (['options=--memory "1g'], 'words of `docker create` are wanted, as --memory 512m'),
    (['options=--bogus 1'], 'options: unknown flag: --bogus'),
    (['options=-v wiki--data:/x'], 'options: wiki--data is a volume of wiki'),
    (['options=--mount src=wiki--a,dst=/x'], 'options: wiki--a is a volume of wiki'),
    (['options=-v /var/lib/dockhand:/x:ro'], 'options: /var/lib/dockhand is below /var/li'),
    (['options=-v /var/lib/../lib//dockhand/apps:/x'], 'is below /var/lib/dockhand'),
    (['options=-v /home/git/.ssh:/x'], 'options: /home/git/.ssh is below /home/git'),
    (['options=-v ./usr/local/lib/dockhand:/x'], 'is below /usr/local/lib/dockhand'),
    (['options=-v /var/lib/docker/volumes/wiki--a/_data:/x'], 'is below /var/lib/docker'),
    (['options=--mount type=volume,dst=/x,volume-opt=o=bind,volume-opt=device=/home/git'],
     'options: /home/git is below /home/git'),
    (['options=--name x'], 'options: leave out `--name`'),
    (['build=-t x'], 'build: `-t` is not taken'),
    (['build=--build-arg X'], 'build names X, and config has no such variable'),
    (['folder=../x'], 'folder=../x: the path of a folder of the repository is wanted, as'),
    (['folder=/a'], 'the path of a folder'), (['folder=a//b'], 'the path of a folder'),
    (['folder=.git'], 'the path of a folder'), (['folder='], 'the path of a folder'),
    (['check=up'], 'check=up: the path of a page is wanted, as /up'),
    (['check=/a b'], 'the path of a page is wanted'),
    (['port=0'], 'port=0: a number from 1 to 65535 is wanted, or none')])
def test_a_setting_that_cannot_be_had_is_refused_and_nothing_changes(plain, words, said):
    plain.lives(ONE_TYPES)
    before, containers = plain.whole(), str(plain.containers)
    assert said in refusal(dh.cmd_config, plain.app, *words)
    assert plain.changed(before) == [] and str(plain.containers) == containers

def test_a_release_that_would_have_no_process_leaves_its_number_and_why(plain):
    plain.lives(ONE_WEB)
    assert 'without a web process' in refusal(dh.cmd_config, plain.app, 'scale=web=0')
    assert plain.app.load(2).failed.startswith('scale: without a web process')
    dh.cmd_config(plain.app, 'A=1')
    assert plain.app.live().number == 3

@pytest.mark.parametrize('words, said', [
    (['options=--bogus 1'], 'options: unknown flag: --bogus'),
    (['options=-v wiki--data:/x'], 'options: wiki--data is a volume of wiki')])
def test_options_are_refused_before_the_first_push_too(plain, words, said):
    assert said in refusal(dh.cmd_config, plain.app, *words)
    assert plain.app.config() == {}

IN_TWO = {'a/Dockerfile': 'FROM one\nHEALTHCHECK x\nEXPOSE 8000\n',
          'a/Procfile': 'web: serve\n', 'b/Dockerfile': 'FROM b', 'Procfile': 'x: y'}

def test_one_folder_of_a_repository_is_an_app_and_what_is_beside_it_is_not(plain, capfd):
    plain.nginx()
    dh.cmd_config(plain.app, 'folder=a')
    plain.push(IN_TWO, old=ZERO, new=SHA)
    assert ('docker build --force-rm -t blog:1 /var/lib/dockhand/build/blog/a'
            in plain.done)
    assert plain.containers['blog--1']['command'] == ['serve']
    capfd.readouterr()
    plain.push(dict(IN_TWO, **{'b/Dockerfile': 'FROM c'}))
    assert '-----> Nothing below a has changed\n' in capfd.readouterr().err
    assert plain.app.live().number == 2
    plain.push(dict(IN_TWO, **{'a/x': 'new'}), old=SHA_2, new=SHA_3)
    assert 'Nothing below a' not in capfd.readouterr().err
    del plain.done[:]
    dh.cmd_config(plain.app, 'A=1')
    assert not [line for line in plain.done if line.startswith('docker build')]
    plain.commits[SHA_3] = dict(IN_TWO, **{'b/Dockerfile': 'FROM b\nHEALTHCHECK x\n'})
    dh.cmd_config(plain.app, 'folder=b')
    assert plain.app.live().image == 'sha256:FROMb'
    assert plain.app.live().procfile == ''
    dh.cmd_rollback(plain.app)
    assert plain.app.config()['folder'] == 'a' and plain.app.live().procfile

@pytest.mark.parametrize('config, files, said', [
    ({}, {'dockerfile': 'FROM one'},
     'no Dockerfile in this commit, but `dockerfile`: git mv dockerfile Dockerfile'),
    ({}, {'api/Dockerfile': 'FROM one'}, 'no Dockerfile at the top of this commit, but in '
     '`api`: dockhand config blog --next folder=api'),
    ({}, {'y/z/Dockerfile': 'FROM one', 'x/b/c/Dockerfile': 'x', '.a/Dockerfile': 'x',
          'y/a b/Dockerfile': 'FROM one', 'n/dockerfile': 'x'}, 'but in `y/z`: dockhand config'),
    ({'folder': 'a'}, {'a/b/Dockerfile': 'FROM one'},
     'but in `a/b`: dockhand config blog --next folder=a/b'),
    ({}, {'prod.Dockerfile': 'FROM one'},
     'but `prod.Dockerfile`: dockhand config blog --next build="-f prod.Dockerfile"'),
    ({}, {'Procfile': 'web: x'}, 'a Procfile says what runs, and no Dockerfile in this'),
    ({}, {'x': 'y'}, 'no Dockerfile in this commit: it says how to build the app'),
    ({'folder': 'c'}, IN_TWO, 'folder=c: there is no such folder in this commit'),
    ({'folder': 'a/Dockerfile'}, IN_TWO, 'folder=a/Dockerfile: there is no such folder'),
    ({'build': '-f x'}, IN_TWO, 'no x in this commit, which config names: dockhand config'),
    ({'build': '--build-arg A'}, {'Dockerfile': 'FROM one'},
     'build names A, and config has no such variable: dockhand config blog A=-'),
    ({'build': '--secret id=a,env=B'}, {'Dockerfile': 'FROM one'}, 'build names B, and')])
def test_what_is_there_instead_of_a_dockerfile_is_named_with_what_to_type(
        plain, config, files, said):
    plain.nginx()
    plain.app.save_config(config)
    assert said in refusal(lambda: plain.push(files, old=ZERO, new=SHA))
    assert plain.app.live() is None and plain.containers == {}

@pytest.mark.parametrize('link, config, said', [
    ('a', {'folder': 'a/b'}, 'folder=a/b: `a` is a link: commit what it leads to'),
    ('a/b', {'folder': 'a/b'}, 'folder=a/b: `b` is a link'),
    ('a', {'build': '-f a/x'}, 'a/x: `a` is a link'),
    ('x', {'build': '-f x'}, 'x is a link: commit a plain file'),
    ('x.dockerignore', {'build': '-f x'}, 'x.dockerignore is a link: commit a plain file')])
def test_no_link_is_followed_on_the_way_to_what_is_built(tmpdir, link, config, said):
    outside = tmpdir.mkdir('outside')
    outside.join('b').ensure(dir=True)
    outside.join('x').write('FROM root')
    tree = tmpdir.mkdir('tree')
    tree.join('x').write('FROM one')
    if '/' in link:
        tree.mkdir('a')
    if link == 'x':
        tree.join('x').remove()
    tree.join(link).mksymlinkto(outside.join('x') if link[0] == 'x' else outside)
    def check():
        folder = dh.folder_in(str(tree), config.get('folder'))
        dh.check_dockerfile(release(config=config), folder)
    assert said in refusal(check)

def test_a_change_of_what_is_built_with_builds_the_live_commit_again(plain):
    plain.lives(ONE_WEB, TOKEN='1', OTHER='2')
    plain.commits[SHA] = dict(ONE_WEB, **{'d/x': 'FROM two\nHEALTHCHECK x\nEXPOSE 8000\n'})
    dh.cmd_config(plain.app, 'build=-f d/x --build-arg TOKEN')
    build, = [line for line in plain.done if line.startswith('docker build')]
    assert build == ('docker build --force-rm -t blog:2 --file=/var/lib/dockhand/build/blog'
                     '/d/x --build-arg=TOKEN /var/lib/dockhand/build/blog')
    assert plain.app.live().image == 'sha256:FROMtwo'
    for change, is_built in (('OTHER=3', False), ('TOKEN=2', True)):
        del plain.done[:]
        dh.cmd_config(plain.app, change)
        assert any(line.startswith('docker build') for line in plain.done) == is_built
    dh.cmd_rollback(plain.app, '1')
    assert plain.app.live().image == 'sha256:FROMone'

@each('setting', 'options=--init check=/up scale=web=2 port=80 overlap=yes')
@pytest.mark.parametrize('is_live', [False, True])
def test_what_a_job_says_itself_is_refused_by_name(machine, setting, is_live):
    key = setting.partition('=')[0]
    said = '%s is for apps without a job, whose upstart.conf says itself what runs' % key
    if is_live:
        machine.lives(FILES)
        before = machine.whole()
        assert said in refusal(dh.cmd_config, machine.app, setting)
    else:
        machine.nginx()
        dh.cmd_config(machine.app, setting)
        before = machine.whole()
        assert said in refusal(machine.push, FILES, MAIN, ZERO, SHA)
        assert 'docker build' not in ' '.join(machine.done)
        return
    assert machine.changed(before) == []

def test_a_job_and_a_procfile_are_one_too_many(machine):
    machine.lives(FILES)
    before = machine.whole()
    assert refusal(machine.push, dict(FILES_2, Procfile='web: x\n')) == (
        'upstart.conf says itself what runs, and so does Procfile: remove one of the two')
    assert machine.changed(before) == []

@pytest.mark.parametrize('words', [['A=-'], ['-'], ['B=1', 'A=-']])
def test_nobody_waits_for_what_is_piped_into_config(plain, monkeypatch, words):
    plain.lives(ONE_WEB)
    with counted_locks() as taken:
        monkeypatch.setattr(dh, 'read_stdin', lambda: 'A=' + str(taken))
        dh.cmd_config(plain.app, *words)
    assert plain.app.config()['A'] in ('[]', 'A=[]') and 'blog' in taken

@pytest.mark.parametrize('words', [['A=-', 'C=-'], ['-', 'A=-'], ['-', '-']])
def test_what_is_piped_in_is_for_one_word_alone(plain, words):
    with standard_input(b'A=1'):
        assert 'only one KEY=-' in refusal(dh.cmd_config, plain.app, *words)
    assert plain.app.config() == {}

@each('option', 'unset env next')
def test_an_option_of_config_wants_something_to_change(plain, option):
    plain.lives(ONE_WEB)
    with pytest.raises(dh.Usage):
        dh.cmd_config(plain.app, **{option: True})

@pytest.mark.parametrize('closed', [[0], [1], [2], [0, 1], [0, 1, 2]])
def test_a_closed_stream_leads_nowhere_and_to_no_file_of_ours(tmpdir, closed):
    script = ('import os, sys\nfor fd in %r: os.close(fd)\nif 0 in %r: sys.stdin = None\n'
              'import dockhand\ndockhand.open_closed_streams()\n'
              'file = os.open("new", os.O_CREAT | os.O_RDWR)\n'
              'dockhand.tell("told"); dockhand.say("said")\n'
              'assert sys.stdin is not None\nos._exit(file > 2)' % (closed, closed))
    asked = subprocess.Popen([sys.executable, '-c', script], cwd=str(tmpdir), env=dict(
        os.environ, PYTHONPATH=os.path.dirname(os.path.abspath(dh.__file__))))
    assert asked.wait() == 1 and tmpdir.join('new').read() == ''

def test_a_connection_that_breaks_is_no_end_of_what_is_piped_in(plain, monkeypatch):
    plain.lives(ONE_WEB)
    before = plain.whole()
    monkeypatch.setattr(dh, 'is_hung_up', lambda: True)
    for act in (functools.partial(dh.cmd_config, plain.app, 'KEY=-'),
                functools.partial(dh.cmd_config, plain.app, '-'),
                functools.partial(dh.cmd_upload_key, plain.host, 'bob'),
                functools.partial(dh.cmd_https, plain.host, 'blog', cert=True)):
        with standard_input(b'half of a ke'):
            assert 'the connection broke' in refusal(act)
    assert plain.changed(before) == []

@each('command', '''config\\_blog\\_--values proxy\\_blog status\\_blog\\_--json''')
def test_what_is_somebodys_own_is_not_put_into_other_words(plain, capfd, monkeypatch, command):
    plain.lives(ONE_WEB)
    dh.cmd_config(plain.app, 'NOTE=see dockhand status blog')
    for voice in (dh.say, dh.tell):
        monkeypatch.setattr(voice, 'reword', dh.typed_by_ssh)
    capfd.readouterr()
    by_ssh(plain, command)
    assert 'ssh git@HOST' not in capfd.readouterr().out

def test_a_job_of_inits_has_no_variable_of_several_lines(machine):
    job = 'start on x\nexec docker run --rm --env-file=%s blog\n' % (
        '/var/lib/dockhand/apps/blog/env')
    machine.lives(but('job', job))
    with standard_input(b'a\nb\n'):
        if machine.init == 'upstart':
            assert refusal(dh.cmd_config, machine.app, 'KEY=-').startswith(
                'KEY has several lines, which no job of init can have')
        else:
            dh.cmd_config(machine.app, 'KEY=-')
            create, = [line for line in machine.done if line.startswith('docker create')]
            assert '--env=KEY' in create and 'a\nb' not in create

@table('config, procfile, said, ran', """
         => release: up 2 => up 2 => up 2
    down => release: up   => down => down
    down => web: x        => down => down
         => web: x        =>      =>""")
def test_the_release_command_of_config_goes_before_that_of_the_procfile(
        plain, capfd, config, procfile, said, ran):
    plain.lives(ONE_WEB, **{'release': config} if config else {})
    plain.push(dict(TWO_WEB, Procfile=procfile + '\n'))
    runs = [line for line in plain.done if line.startswith('docker run --rm')]
    assert [line.endswith(' sha256:FROMtwo ' + ran) for line in runs] == [True] * bool(ran)
    err = capfd.readouterr().err
    assert ('Running the release command: %s\n' % said in err) == bool(said)
    assert ('that of the Procfile is not run' in err) == bool(
        config and procfile.startswith('release'))

@pytest.mark.parametrize('was_there', [False, True])
def test_a_procfile_that_older_versions_did_not_read_is_told(plain, capfd, was_there):
    plain.lives(ONE_WEB)
    plain.commits[SHA] = dict(ONE_WEB, **{'Procfile': 'web: x\n'} if was_there else {})
    plain.push(dict(TWO_WEB, Procfile='web: y\n'))
    assert ('Note: the Procfile says from now on what runs' in capfd.readouterr().err
            ) == was_there
    plain.push(dict(ONE_WEB, Procfile='web: z\n'), old=SHA_2, new='3' * 40)
    assert 'Note: the Procfile' not in capfd.readouterr().err

def test_the_log_of_a_process_is_shown_by_its_name(plain, capfd):
    plain.lives(ONE_TYPES, scale='worker=2')
    live = plain.app.live()
    assert dh.process_called(live, 'worker.2').name == 'blog--1--worker--2'

    def shown(title):
        return [(reader.title, reader.container)
                for reader in dh.log_readers(plain.app, live, title)]
    worker, second = 'blog--1--worker', 'blog--1--worker--2'
    assert shown(None) == [('web', 'blog--1'), ('worker', worker), ('worker.2', second)]
    assert shown('worker') == [('worker', worker), ('worker.2', second)]
    assert shown('worker.2') == [('worker.2', second)]
    assert refusal(dh.process_called, live, 'w') == (
        'no process of blog is called w: web worker worker.2')

@pytest.mark.parametrize('act', [
    lambda plain: dh.cmd_recover(plain.host), lambda plain: dh.cmd_start(plain.app)])
@pytest.mark.parametrize('harm', [
    lambda plain: plain.containers['blog--1--worker']['State'].update(Running=False),
    lambda plain: plain.containers.pop('blog--1--worker')])
def test_only_what_does_not_run_is_started(plain, capfd, act, harm):
    plain.lives(ONE_TYPES)
    harm(plain)
    act(plain)
    assert plain.running() == ['sha256:FROMone'] * 2
    assert not [line for line in plain.done if re.match('docker (stop|restart) .*blog--1$', line)]

def test_what_is_started_for_ever_is_stopped_before_it_is_started(tmpdir):
    machine = Machine(tmpdir, 'upstart')
    machine.lives(FILES)
    stopped = []
    states = iter([dh.State(None, None, [], '', 'start/pre-start')] * 2)
    state, stop = dh.Upstart.state, dh.Upstart.stop
    dh.Upstart.state = lambda self, live: next(states, None) or state(self, live)
    dh.Upstart.stop = lambda self, live: stopped.append(live.number) or stop(self, live)
    try:
        dh.cmd_start(machine.app)
    finally:
        dh.Upstart.state, dh.Upstart.stop = state, stop
    assert stopped == [1]

def test_what_is_under_way_is_no_fault(plain, capfd):
    half_deployed(plain, 2, (ONE_TYPES, TWO_TYPES))
    plain.containers['blog--1--worker']['State'].update(Running=False)
    with dh.locked(plain.host.path(dh.LOCKS, 'blog'), 'a push of blog by anna'):
        dh.cmd_apps(plain.host)
        assert dh.app_problem(plain.app) == dh.WELL
    assert re.search('blog +changing .*  a push of blog by anna, since ',
                     capfd.readouterr().out)
    dh.cmd_apps(plain.host)
    assert 'DOWN' in capfd.readouterr().out
    assert 'was interrupted' in dh.app_problem(plain.app)[0]

def test_apps_says_which_container_is_gone(plain, capfd):
    plain.lives(ONE_TYPES)
    del plain.containers['blog--1--worker']
    capfd.readouterr()
    dh.cmd_apps(plain.host)
    assert 'DOWN' in capfd.readouterr().out.partition('the container of worker is gone')[0]

def test_what_the_live_commit_cannot_have_is_noted_for_the_next_push(plain, capfd):
    plain.lives(ONE_WEB)
    assert 'config --next notes it for the next push' in refusal(
        dh.cmd_config, plain.app, 'folder=api')
    before = plain.whole()
    capfd.readouterr()
    dh.cmd_config(plain.app, 'folder=api', next=True)
    assert capfd.readouterr().out == 'blog: noted for its next push\n'
    assert plain.changed(before) == [CONFIG]
    plain.push(dict(('api/' + name, text) for name, text in TWO_WEB.items()))
    assert plain.app.live().config == {'folder': 'api'}
    dh.cmd_rollback(plain.app)
    assert plain.app.config() == {}

@each('name', 'refs/heads/main HEAD plan', '')
def test_a_branch_is_not_called_so(name):
    assert not dh.is_branch_name(name)

@pytest.mark.parametrize('branch, clashes', [
    ('main/next', True), ('next', False), ('a', True), ('a/b', False), ('a/b/c', True)])
def test_a_branch_that_git_cannot_have_beside_others_is_refused(plain, branch, clashes):
    plain.lives(ONE_WEB)
    git = plain.git

    def listing(folder, verb, *words):
        if verb == 'for-each-ref' and words[-1] == 'refs/heads/':
            return 'refs/heads/main\nrefs/heads/a/b\n'
        return git(folder, verb, *words)
    plain.git = listing
    if clashes:
        assert 'git cannot have it beside the branch' in refusal(
            dh.cmd_config, plain.app, 'branch=' + branch)
        assert plain.app.config() == {}
    else:
        dh.cmd_config(plain.app, 'branch=' + branch)

@pytest.mark.parametrize('options, said', [
    ('--pid=container:wiki--1', 'options: leave out `--pid=container:wiki--1`'),
    ('--ipc container:x', 'it reaches into another app'),
    ('-v /:/host', 'options: / holds /var/lib/dockhand, which is no place for an app to write'),
    ('-v /var/lib:/v', 'options: /var/lib holds /var/lib/dockhand'),
    ('--mount type=bind,src=/var,dst=/v', 'options: /var holds /var/lib/dockhand')])
def test_no_option_reaches_into_what_is_anothers(plain, options, said):
    assert said in refusal(dh.check_options, plain.app, options)
    dh.check_options(plain.app, '-v /:/host:ro --pid host')     # as a monitor wants it
    dh.check_options(plain.app, '--add-host container:10.0.0.5')

def test_docker_that_is_away_is_not_blamed_on_options():
    host = Host('/', lambda argv: Result(1, '', 'Cannot connect to the Docker daemon\n'))
    assert refusal(dh.check_options, dh.App(host, 'blog'), '--memory=1g').startswith(
        'docker does not answer: Cannot')

def test_a_line_of_a_procfile_may_be_too_long():
    assert 'Procfile:2: longer than 8000 characters: put that in a script' in refusal(
        dh.parse_procfile, 'web: a\nworker: %s\n' % ('x' * 8001))

def test_locks_of_cron_go_with_the_app(plain):
    plain.lives(ONE_CRON)
    for name in ('blog--12345678', 'blogs--12345678'):
        plain.write(dh.CRON_LOCKS + '/' + name, '')
    dh.cmd_destroy(plain.app, force=True)
    assert os.listdir(plain.host.path(dh.CRON_LOCKS)) == ['blogs--12345678']

@each('name', 'id name line running status IFS PPID dockhand_id _ PATH')
def test_a_variable_of_lines_has_any_name_in_a_crontab(name, tmpdir):
    options = ['--env=' + name, 'image']
    made = release(crontab='* * * * * true\n', config={dh.variable_key(name): 'a\nb'},
                   port=0, web=False)
    script = dh.render_cron_script(made, options, {name: 'a\nb'})
    subprocess.check_call(['sh', '-n', '-c', script])
    fake = tmpdir.mkdir('bin').join('docker')
    fake.write('#!/bin/sh\n[ "$1" = ps ] || { echo "$@"; env; } >>%s\n' % tmpdir.join('ran'))
    fake.chmod(0o755)
    for tool in ('logger', 'flock'):
        tmpdir.join('bin', tool).write('#!/bin/sh\ncat >/dev/null 2>&1 </dev/null\n')
        tmpdir.join('bin', tool).chmod(0o755)
    script = script.replace(dh.CRON_LOCKS, str(tmpdir))
    line, = dh.cron_lines(made)
    env = {'PATH': '%s:/usr/bin:/bin' % tmpdir.join('bin')}
    assert subprocess.call(['sh', '-c', script, 'sh', dh.cron_id(line)], env=env) == 0
    ran = tmpdir.join('ran').read()
    assert '--name blog--3--cron-' + dh.cron_id(line) in ran
    assert re.search(r'(?m)(^|--env=)%s=a\nb' % name, ran), ran

@pytest.mark.parametrize('config, said', [
    ({}, 'It listens on 3000: dockhand config blog port=3000'), ({'port': 'none'}, '')])
def test_a_worker_that_listens_is_told_how_it_becomes_a_web_app(
        plain, capfd, config, said):
    plain.lives(an_app('one', ''), **config)
    start = plain.docker_start
    plain.docker_start = lambda *words: start(*words) or plain.containers['blog--2'][
        'State'].update(Pid=77)
    tcp(plain, 77, 'tcp', ('00000000:0BB8', '00000000:0000', '0A'))
    plain.push(an_app('two', ''))
    assert re.findall('It listens.*', capfd.readouterr().err) == [said] * bool(said)

def test_where_an_app_listens_instead_is_told_with_what_to_type(plain, capfd):
    live = plain.lives(ONE_WEB, timeout='3')
    tcp(plain, 77, 'tcp', ('00000000:0BB8', '00000000:0000', '0A'))
    capfd.readouterr()
    dh.tell_where_it_listens(plain.app, live, [77])
    assert capfd.readouterr().err == (
        '-----> It listens on 3000: dockhand config blog port=3000\n')

@pytest.mark.parametrize('overlap', [None, 'yes', 'no'])
@pytest.mark.parametrize('old, new, expected', [
    ({}, {}, True), ({'volumes': ['/a']}, {}, False), ({}, {'volumes': ['/a']}, False),
    ({'volumes': ['/a']}, {'volumes': ['/a']}, False), ({'web': False}, {}, False),
    ({}, {'web': False}, False), ({'web': False}, {'web': False, 'port': 0}, False),
    ({'addresses': [], 'job': 'exec x'}, {}, None),
    ({}, {'addresses': [], 'job': 'x'}, None), (None, {}, None), ({}, None, None)])
def test_only_web_apps_without_data_are_handed_over_unless_told(
        old, new, expected, overlap):
    config = {'overlap': overlap} if overlap else {}
    old, new = [None if each is None else release(config=more, **each)
                for each, more in ((old, {}), (new, config))]
    assert dh.Containers(dh.App(Host(), 'blog')).overlaps(old, new) == (
        expected is not None and (overlap == 'yes' if overlap else expected))

LOGGED = ('--log-driver=json-file --log-opt=max-size=10m --log-opt=max-file=3 '
          '--pids-limit=4096')
NGINX_T = 'nginx -t -q -c /etc/nginx/.blog.conf.new\n'
MADE_SO = '''--name blog--2 --net=dockhand --ip=10.86.0.3 --net-alias=blog \
--env-file=/var/lib/dockhand/apps/blog/releases/2/env \
--add-host=host.docker.internal:10.86.0.1 %s--label=dockhand.app=blog --init \
''' + LOGGED + ' sha256:FROMtwo\n'
CREATED = 'docker create ' + MADE_SO
LAUNCHED = NGINX_T + 'docker run ' + MADE_SO.replace('%s', '%s--detach ')
PLAIN_BUILD = BUILD.replace(NGINX_T, '')

def without_commit(text):
    """The lines of an environment, but for the commit."""
    return re.sub(r'GIT_REV=[0-9a-f]{40}\n', '', text)

def env_of(machine, name):
    """What a container was given, but for the commit."""
    return without_commit(machine.containers[name]['env'])
STOPPED = 'docker update --restart no blog--1\ndocker stop -t 10 blog--1\n'
TAGGED = 'docker tag blog:2 blog:latest\n'
SETTLED = 'docker update --restart always blog--2\n'
PROXIED = NGINX_T + 'kill -HUP 50\n'
HANDED_OVER = 'kill -HUP 50\n' + TAGGED + SETTLED + PROXIED + STOPPED
SWITCHED = STOPPED + 'kill -HUP 50\ndocker start blog--2\n' + TAGGED + SETTLED
RESTARTED = NGINX_T + CREATED + SWITCHED
ON_VOLUME = '--volume=blog--data:/data '

def plain_proxy(number, domains='blog blog.*', port=8000):
    """The proxy file of a plain app's release with this number."""
    made = ("# dockhand: blog's proxy file, made at each push; "
            '`dockhand proxy blog` prints one\n')
    body = generated('blog', domains, **BLOG_LOGGED)
    address = '10.86.0.%d:%d' % (number + 1, port)
    where = (UPSTREAM % '    keepalive_timeout 1s;\n').replace('10.86.0.2:8000', address)
    return made + body + where

@pytest.mark.parametrize('more, config, expected, gap', [
    ('', {}, LAUNCHED % '' + HANDED_OVER, ', no gap'),
    ('', {'overlap': 'no'}, RESTARTED % '', ', down for N s'),
    ('VOLUME /data', {}, RESTARTED % ON_VOLUME, ', down for N s'),
    ('VOLUME /data', {'overlap': 'yes'}, LAUNCHED % ON_VOLUME + HANDED_OVER, ', no gap')])
def test_a_plain_web_app_is_switched_in_this_order(
        plain, capfd, more, config, expected, gap):
    plain.lives(an_app('one', 'EXPOSE 8000\n' + more), **config)
    plain.shares = config.get('overlap') == 'yes'
    capfd.readouterr()
    plain.push(an_app('two', 'EXPOSE 8000\n' + more))
    assert '\n'.join(plain.done) + '\n' == PLAIN_BUILD + expected
    assert plain.running() == ['sha256:FROMtwo']
    assert plain.served == {'/etc/nginx/conf.d/blog.conf': plain_proxy(2)}
    policies = dict((name, each['policy']) for name, each in plain.containers.items())
    assert policies == {'blog--1': 'no', 'blog--2': 'always'}
    assert env_of(plain, 'blog--2') == 'PORT=8000\n'
    live = plain.app.live()
    assert (live.number, live.port, live.web, live.addresses, live.config, live.job) == (
        2, 8000, True, ['10.86.0.3'], config, '')
    assert live.volumes == (['/data'] if more else []) and live.seconds > 0
    said = re.sub(r'\d\.\d s', 'N s', capfd.readouterr().err)
    assert re.findall('-----> (.*)', said) == [
        'Checking 2222222222', 'Building blog:2', 'Switching to release 2',
        'Release 2 is live: built in N s, switched in N s, checked in N s' + gap]

@pytest.mark.parametrize('more', ['', 'VOLUME /data'])
def test_a_rollback_of_a_plain_app_starts_the_kept_container_again(plain, more):
    plain.lives(an_app('one', 'EXPOSE 8000\n' + more))
    plain.push(an_app('two', 'EXPOSE 8000\n' + more))
    del plain.done[:]
    dh.cmd_rollback(plain.app)

    def turned(text):
        swapped = {'1': '2', '2': '1'}
        return re.sub('(?<=blog--)[12]|(?<=blog:)[12]', lambda m: swapped[m.group()],
                      text)
    # (What nginx is told at last it was asked about when this was live before.)
    back = NGINX_T + 'docker start blog--2\n' + HANDED_OVER.replace(
        PROXIED + STOPPED, 'kill -HUP 50\n' + STOPPED)
    done = [line for line in plain.done if line.startswith(('docker', 'nginx', 'kill'))]
    assert '\n'.join(done) + '\n' == turned(SWITCHED if more else back)
    assert plain.running() == ['sha256:FROMone']
    assert plain.served == {'/etc/nginx/conf.d/blog.conf': plain_proxy(1)}

@pytest.mark.parametrize('path', ['', '/usr/libexec/docker/docker-init'])
def test_a_docker_without_an_init_of_its_own_is_not_asked_for_it(plain, path):
    plain.lives(ONE_WEB)
    os.unlink(plain.host.path('/usr/bin/docker-init'))
    if path:
        plain.write(path, '')
    plain.push(TWO_WEB)
    launched = (LAUNCHED % '').splitlines()[1]
    assert ' --init ' in launched
    assert (launched if path else launched.replace(' --init', '')) in plain.done

@each('name', 'dies sick mute')
def test_a_version_that_never_gets_well_is_not_handed_over_to(plain, capfd, name):
    plain.lives(ONE_WEB)
    before, served = plain.whole(), plain.served
    assert 'release 2 failed its health check' in refusal(
        plain.push, an_app(name, CHECKED if name == 'sick' else 'EXPOSE 8000'))
    assert plain.changed(before) == [] and plain.served == served
    assert not [line for line in plain.done if re.match('docker stop.*--1', line)]
    err = capfd.readouterr().err
    assert '       its last words\n' in err
    assert err.endswith('-----> Release 1 runs as before\n')

def test_a_version_that_dies_after_its_first_answer_gives_way_to_the_old_one(plain):
    plain.lives(ONE_WEB)
    before, served, reload, seen = plain.whole(), plain.served, plain.nginx_s, []

    def first_request_kills_it(*words):
        answer = reload(*words)
        if not seen:
            seen.extend(plain.served.values())
            plain.containers['blog--2']['State'].update(Running=False, ExitCode=3)
        return answer
    plain.nginx_s = first_request_kills_it
    assert 'it does not run: exited with 3' in refusal(plain.push, TWO_WEB)
    assert seen == [plain_proxy(2).replace(
        '    keepalive 64', '    server 10.86.0.2:8000 backup;\n    keepalive 64')]
    assert plain.changed(before) == [] and plain.served == served
    assert not [line for line in plain.done if re.match('docker stop.*--1', line)]

def test_a_death_while_it_is_watched_is_seen_at_the_next_look(plain):
    """Docker is not asked before."""
    plain.lives(ONE_WEB)
    connect, looks = plain.host.connect, []

    def dies_at_the_tenth_look(place, *words):
        looks.append(place)
        if len(looks) == 10:
            plain.containers['blog--2']['State'].update(Running=False, ExitCode=3)
        return connect(place, *words)
    plain.host.connect = dies_at_the_tenth_look
    asked, call = [], plain.host.ask

    def ask(argv, **options):
        asked.append((len(looks), list(argv)))
        return call(argv, **options)
    plain.host.ask = ask
    assert 'it does not run: exited with 3' in refusal(plain.push, TWO_WEB)
    inspected = [count for count, argv in asked if argv == ['docker', 'inspect', 'blog--2']]
    assert 10 <= inspected[0] <= 15         # in which it may yet listen, for 0.1 s

@pytest.mark.parametrize('changes, is_known', [
    ({}, True), ({'healthcheck': True}, False), ({'healthcheck': None}, False),
    ({'port': 0}, False), ({'job': 'exec x'}, False),
    ({'config': {'scale': 'web=2'}, 'addresses': ['10.86.0.2', '10.86.0.3']}, False)])
def test_what_a_container_has_is_known_where_nothing_but_its_port_counts(
        changes, is_known):
    fields = dict({'healthcheck': False}, **changes)
    found = dh.Containers(dh.App(Host(), 'blog')).expected_state(release(**fields))
    assert (found is not None) == is_known
    assert not found or (found.alive, found.ports) == (True, [('10.86.0.2', 8000)])

@pytest.mark.parametrize('settings, options, expected', [
    ({}, '', False), ({'Healthcheck': None}, '', False), ({'Healthcheck': {}}, '', False),
    ({'Healthcheck': {'Test': ['NONE']}}, '', False), ({}, '--memory 1g', False),
    ({'Healthcheck': {'Test': ['CMD', 'true']}}, '', True),
    ({}, '--health-cmd "curl localhost"', True), ({}, '--health-interval=5s', True),
    ({'Healthcheck': {'Test': ['CMD-SHELL', 'x']}}, '--no-healthcheck', True)])
def test_a_healthcheck_is_one_of_the_image_or_of_config(settings, options, expected):
    config = {'options': options} if options else {}
    assert dh.has_healthcheck(settings, release(config=config)) == expected

def test_nginx_is_not_asked_twice_about_the_same(plain):
    plain.nginx()
    plain.write('/etc/nginx/conf.d/other.conf', 'server { server_name other.org; }\n')
    nginx = plain.host.nginx

    def asks(text):
        del plain.done[:]
        assert nginx.test('blog', text, nginx.files()) == ''
        return [line for line in plain.done if line.startswith('nginx -t')]
    assert asks(WEB) and not asks(WEB) and asks(WEB + '# other\n') and not asks(WEB)
    plain.write('/etc/nginx/conf.d/other.conf', 'server { server_name another.org; }\n')
    assert asks(WEB) and not asks(WEB)
    plain.write('/etc/nginx/nginx.conf', plain.read('/etc/nginx/nginx.conf') + '# other\n')
    assert asks(WEB) and not asks(WEB)
    plain.broken['nginx -t'] = 1
    assert nginx.test('blog', WEB + '# new\n', nginx.files()) and asks(WEB + '# new\n')

def test_a_stopped_web_app_is_not_started_beside_another(plain):
    plain.lives(ONE_WEB)
    dh.cmd_stop(plain.app)
    plain.push(TWO_WEB)
    assert plain.running() == ['sha256:FROMtwo']

@pytest.mark.parametrize('init', ['none', 'upstart'])
def test_a_job_app_becomes_a_plain_one_and_a_job_app_again(tmpdir, init):
    machine = Machine(tmpdir, init)
    machine.lives(FILES)
    machine.push(TWO_WEB)
    assert machine.running() == ['sha256:FROMtwo'] and machine.jobs == {}
    assert machine.read('/etc/init/blog.conf') is None
    assert machine.read('/etc/init/blog.override') is None
    assert machine.served == {'/etc/nginx/conf.d/blog.conf': plain_proxy(1)}
    machine.push(but('docker', 'FROM three'), MAIN, SHA_2, SHA_3)
    assert machine.running() == ['sha256:FROMthree']
    assert list(machine.jobs) == (['blog'] if init == 'upstart' else [])
    for wanted in ('two', 'three', 'two'):
        dh.cmd_rollback(machine.app)
        assert machine.running() == ['sha256:FROM' + wanted]
        assert len(machine.jobs) == (init == 'upstart' and wanted == 'three')
        dh.cmd_recover(machine.host)
        assert machine.running() == ['sha256:FROM' + wanted]

@pytest.mark.parametrize('init', ['none', 'upstart'])
@pytest.mark.parametrize('plain_first', [False, True])
def test_an_app_that_cannot_change_its_kind_stays_as_it_was(tmpdir, init, plain_first):
    machine = Machine(tmpdir, init)
    machine.lives(ONE_WEB if plain_first else FILES)
    before = machine.whole()
    assert refusal(machine.push,
                   but('docker', 'FROM dies') if plain_first else an_app('dies'))
    assert machine.changed(before) == []

# ---- An engine of its own --------------------------------------------------------------

# The wall between switching and what runs a release: a third engine, written here alone.

class Toy(dh.Engine):
    """Runs a release by noting it; one whose image is called so dies at once."""
    running_now, placed, settled, done = [], [], [], []

    @classmethod
    def takes(cls, host, release):
        return release.config.get('TOY') == 'yes'

    def prepare(self, release, is_ready=False, is_launched=False):
        self.done.append('prepare %d' % release.number)

    def place(self, release):
        self.placed[:] = [release.number]

    def start(self, release):
        self.done.append('start %d' % release.number)
        if 'dies' not in release.image:
            self.running_now[:] = [release.number]

    def stop(self, release):
        self.done.append('stop %d' % release.number)
        self.running_now[:] = []

    def withdraw(self, release):
        self.placed[:] = []

    def settle(self, release):
        self.settled[:] = [release.number]

    def state(self, release):
        runs = self.running_now == [release.number]
        return dh.State(runs, release.number, [], '', 'toy' if runs else 'fell over')

    def logs_command(self, release, lines, *follow):
        return ('tail', 'toy', lines)

@pytest.fixture
def toys(plain):
    """Release 1 of blog runs as a toy, and so will what follows."""
    del Toy.done[:]
    dh.ENGINES.insert(0, Toy)
    yield plain.lives(an_app('one', ''), TOY='yes')
    dh.ENGINES.remove(Toy)

def test_another_engine_deploys_and_rolls_back_through_the_same_apply(plain, toys):
    plain.push(an_app('two', ''))
    assert Toy.done[-3:] == ['prepare 2', 'stop 1', 'start 2']
    assert (Toy.running_now, Toy.placed, Toy.settled) == ([2], [2], [2])
    dh.cmd_rollback(plain.app)
    assert Toy.done[-3:] == ['prepare 1', 'stop 2', 'start 1']
    assert (Toy.running_now, Toy.placed, Toy.settled) == ([1], [1], [1])
    assert plain.app.live().number == 1 and plain.containers == {}

def test_another_engine_is_put_back_by_the_same_ways(plain, toys):
    assert 'fell over' in refusal(plain.push, an_app('dies', ''))
    assert (Toy.running_now, Toy.placed, Toy.settled) == ([1], [1], [1])
    assert plain.app.live().number == 1 and plain.app.linked('pending') is None

def test_an_app_goes_from_one_engine_to_another_and_back(plain, toys):
    dh.cmd_config(plain.app, 'TOY=no')
    assert (Toy.running_now, Toy.placed) == ([], []) and Toy.done[-1] == 'stop 1'
    assert plain.running() == ['sha256:FROMone']
    dh.cmd_config(plain.app, 'TOY=yes')
    assert plain.running() == [] and Toy.running_now == [3]

def test_what_an_engine_must_do_has_no_default():
    engine, wanted = dh.Engine(dh.App(Host(), 'blog')), release()
    for act in (engine.start, engine.stop, engine.state):
        pytest.raises(NotImplementedError, act, wanted)

# ---- Several machines, in small --------------------------------------------------------

SPREAD = dict(machines=['10.0.0.1', '10.0.0.2'], published=20007,
              config={'machines': '2', 'A': '1'})

def test_a_service_is_told_all_that_a_container_would_be():
    app = release(config={'machines': 'all', 'KEY': 'a\nb', 'options': '--memory 512m '
                          '--stop-timeout 60 -e B=2 --label x=y'}, published=20007,
                  procfile='web: serve $PORT\nworker: work\n', image='sha256:abc')
    words, env = dh.service_words(app, '/x/env', '10.0.0.1', init=True)
    assert env == {'KEY': 'a\nb'}
    assert ' '.join(words) == (
        '--name=blog--3 --replicas=0 --detach --no-resolve-image --endpoint-mode=dnsrr '
        '--network=name=dockhand--machines,alias=blog '
        '--publish=mode=host,target=8000,published=20007 '
        '--constraint=node.labels.dockhand.blog.3==sha256:abc '
        '--restart-condition=any --restart-delay=1s --label=dockhand.app=blog '
        '--container-label=dockhand.app=blog --host=host.docker.internal:10.0.0.1 '
        '--env-file=/x/env --env=KEY --init --limit-memory=512m '
        '--stop-grace-period=60s --env=B=2 --container-label=x=y '
        '--log-driver=json-file --log-opt=max-size=10m --log-opt=max-file=3 '
        '--limit-pids=4096 sha256:abc sh -c exec serve $PORT')

def test_no_service_has_a_dot_in_its_name():
    app = release(app='my.app', config={'machines': 'all'}, published=20007)
    words, _ = dh.service_words(app, '/x/env', '10.0.0.1', init=False)
    assert words[0] == '--name=my-_app--3' and '--network=name=dockhand--machines' in words
    assert '--constraint=node.labels.dockhand.my.app.3==sha256:x' in words
    assert dh.app_of_service('my-_app--3.1') == 'my.app'
    assert dh.read_machine_label('dockhand.my.app.3') == ('my.app', 3)
    assert dh.read_machine_label('other.my.app.3') is None

@table('options, said', '''
    -v /srv:/data           => `--volume=/srv:/data` cannot be had on several machines
    -p 25:25                => `--publish=25:25` cannot be had on several machines
    --mount type=bind,source=/a,target=/b => cannot be had on several machines
    --gpus all              => `--gpus=all` cannot be had on several machines
    --privileged            => `--privileged` cannot be had on several machines''')
def test_an_option_that_holds_on_one_machine_alone_is_refused_by_word(options, said):
    option, = dh.read_options(options)
    assert said in refusal(dh.service_option, option)

def test_an_upstream_of_machines_asks_each_again_before_it_gives_up():
    places = [('10.0.0.1', 20007), ('10.0.0.2', 20007)]
    text = dh.upstream('blog', places, (1, 22, 1), are_machines=True)
    assert text == dh.MARK + """upstream blog {
    zone blog 64k;
    server 10.0.0.1:20007 max_fails=1 fail_timeout=10s;
    server 10.0.0.2:20007 max_fails=1 fail_timeout=10s;
    server 10.0.0.1:20007 max_fails=0 backup;
    server 10.0.0.2:20007 max_fails=0 backup;
    keepalive 64;
    keepalive_timeout 1s;
}
"""
    assert 'zone' not in dh.upstream('blog', places, (1, 4, 6), are_machines=True)

@table('there, count', '''
            => 0
    abc     => 3
    abx     => 2
    bc      => 0
    a,ab    => 2
    abcd    => 3
    a,xbc   => 1''')
def test_a_layer_is_left_out_if_all_below_it_are_there(there, count):
    chains = [list(chain) for chain in there.split(',')]
    assert dh.common_layers(list('abc'), chains) == int(count)

def saved_image(path, files, links=()):
    """A tar as `docker save` writes it."""
    with tarfile.open(path, 'w') as target:
        for name, text in files:
            member = tarfile.TarInfo(name)
            member.size = len(text)
            target.addfile(member, io.BytesIO(text.encode()))
        for name, target_name in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target_name
            target.addfile(member)

def test_a_layer_that_a_later_one_leads_to_is_not_left_out(tmpdir):
    """As docker up to 24 writes an image that has the same layer twice."""
    path = str(tmpdir.join('saved'))
    paths = ['%s/layer.tar' % name for name in 'abc']
    saved_image(path, [('manifest.json', json.dumps([{'Layers': paths}]))] + [
        (name, 'x') for name in paths[:2]], [(paths[2], '../a/layer.tar')])
    with tarfile.open(path) as whole:
        assert dh.files_left_out(whole, 0) == set()
        assert dh.files_left_out(whole, 2) == set(paths[1:2])
        assert dh.files_left_out(whole, 3) == set(paths)

DOCKER_INFO = {'ServerVersion': '20.10.24+dfsg1', 'Architecture': 'x86_64', 'Name': 'web2',
               'Swarm': {'LocalNodeState': 'inactive'}}

@pytest.mark.parametrize('front, there, said', [
    ({}, {'ServerVersion': '19.03.8'}, '10.0.0.2: docker 19.03.8 is too old: 20.10'),
    ({'ServerVersion': '18.9'}, {}, 'this server: docker 18.9 is too old'),
    ({}, {'LiveRestoreEnabled': True}, '10.0.0.2: docker has live-restore'),
    ({'LiveRestoreEnabled': True}, {}, 'this server: docker has live-restore'),
    ({}, {'FirewallBackend': {'Driver': 'nftables'}}, 'the firewall backend nftables'),
    ({}, {'Swarm': {'LocalNodeState': 'active'}}, 'belongs to another swarm (active)'),
    ({}, {'Architecture': 'aarch64'}, 'another kind of processor (aarch64, here x86_64)')])
def test_a_machine_whose_docker_does_not_go_with_ours_is_refused(front, there, said):
    dh.check_fits(DOCKER_INFO, dict(DOCKER_INFO, ServerVersion='29.0.1'), '10.0.0.2')
    dh.check_fits(DOCKER_INFO, dict(DOCKER_INFO, FirewallBackend={
        'Driver': 'iptables+firewalld'}), '10.0.0.2')
    assert said in refusal(dh.check_fits, dict(DOCKER_INFO, **front),
                           dict(DOCKER_INFO, **there), '10.0.0.2')

@each('target', 'web2 root@web2 10.0.0.2 me@10.0.0.2 root@10.0.0.256 root@10.0.0.2;id '
                'root@-oProxyCommand=x root@::1')
def test_a_machine_is_added_by_roots_ssh_and_its_address_alone(plain, target):
    assert 'wanted: machines add root@ADDRESS' in refusal(
        dh.add_machine, plain.host, target)
    assert plain.done == []

@pytest.fixture
def spread(plain):
    """blog, with a worker, is live on a front and two machines more."""
    plain.spread('web2', 'web3')
    plain.lives(ONE_TYPES, machines='all')
    return plain

PLACES = [('192.0.2.%d' % at, 20001) for at in (11, 12, 13)]

def test_a_push_reaches_each_machine_and_nginx_knows_them_all(spread, capfd):
    live = spread.app.live()
    assert dh.engine_of(spread.app, live).places(live) == PLACES
    spread.push(TWO_TYPES)
    live = spread.app.live()
    assert (live.number, live.published, live.machines) == (
        2, 20002, [place[0] for place in PLACES])
    assert sorted(spread.services) == ['blog--1', 'blog--2']
    assert [spread.services[name]['count'] for name in ('blog--1', 'blog--2')] == [0, 3]
    assert sorted(task[1:] for task in spread.tasks()) == [
        (address, 20002, 'Running') for address, _ in PLACES]
    assert spread.read('/etc/nginx/conf.d/blog.conf').count(':20002 ') == 6
    assert spread.containers['blog--2--worker']['State']['Running']
    assert spread.containers['blog--2--worker']['also'] == [dh.OVERLAY]
    assert 'blog--2' not in spread.containers
    assert 'no gap' in capfd.readouterr().err
    for node in ('web2', 'web3'):
        assert sorted(spread.nodes[node]['images']) == ['blog:1', 'blog:2']
    saves = [line for line in spread.done if line.startswith('docker save')]
    assert len(saves) == 1 and saves[0].endswith('.image blog:2')
    assert not dh.list_folder(spread.host.path(dh.STREAMS))
    dh.cmd_rollback(spread.app)
    assert [spread.services[name]['count'] for name in ('blog--1', 'blog--2')] == [3, 0]

def test_a_release_that_dies_there_is_forgotten_on_every_machine(spread):
    before = spread.whole()
    files = dict(TWO_TYPES, Dockerfile='FROM dies\nEXPOSE 8000\n')
    assert 'it does not run: on front: it fell over' in refusal(spread.push, files)
    assert spread.changed(before) == [] and sorted(spread.services) == ['blog--1']
    for node in spread.nodes.values():
        assert sorted(node['labels']) == ['dockhand.blog.1']
        assert 'blog:2' not in node['images']

def test_a_port_that_something_else_has_there_fails_one_push_alone(spread):
    files = dict(TWO_TYPES, Dockerfile='FROM dies\nEXPOSE 8000\n')
    refusal(spread.push, files)
    spread.push(TWO_TYPES)
    assert spread.app.live().published == 20003
    first, last = dh.MACHINE_PORTS
    assert dh.free_port(spread.host, last + 1 - first) == first
    assert dh.free_port(spread.host, last + 2 - first) == first + 2

def test_what_a_person_scaled_to_nothing_is_started_by_recover(spread, capfd):
    spread.services['blog--1']['count'] = 0
    dh.cmd_recover(spread.host)
    assert spread.services['blog--1']['count'] == 3
    assert 'blog: release 1 did not run; starting it' in capfd.readouterr().err.replace(
        'web of ', '')
    del spread.services['blog--1']
    dh.cmd_recover(spread.host)
    assert spread.services['blog--1']['count'] == 3

def test_a_machine_that_is_off_is_named_and_gets_later_what_it_missed(spread, capfd):
    spread.nodes['web3']['state'] = 'down'
    spread.push(TWO_TYPES)
    assert 'On 2 of 3 machines: web3 is down\n' in capfd.readouterr().err
    dh.cmd_apps(spread.host)
    assert 'on 2 of 3 machines: web3 is down' in capfd.readouterr().out
    assert sorted(spread.nodes['web3']['labels']) == ['dockhand.blog.1']

    spread.nodes['web3']['state'] = 'ready'
    dh.cmd_machines(spread.host)
    assert sorted(spread.nodes['web3']['labels']) == ['dockhand.blog.1', 'dockhand.blog.2']
    assert len(spread.tasks()) == 3
    assert re.search('web3 +192.0.2.13 +ready +x86_64 .* blog\n', capfd.readouterr().out)

def test_what_went_while_a_machine_was_off_goes_from_there_too(spread):
    spread.nodes['web3']['state'] = 'down'
    dh.cmd_destroy(spread.app, force=True)
    assert sorted(spread.nodes['web3']['labels']) == ['dockhand.blog.1']
    assert spread.nodes['web2']['labels'] == spread.nodes['web2']['images'] == {}
    assert spread.services == {}
    spread.nodes['web3']['state'] = 'ready'
    dh.cmd_recover(spread.host)
    assert spread.nodes['web3']['labels'] == spread.nodes['web3']['images'] == {}

def test_an_app_follows_as_machines_come_and_go(spread, capfd):
    web3 = spread.nodes.pop('web3')
    spread.app.save_config({'machines': 'all', 'NOTED': 'for the next push'})
    dh.spread_anew(spread.host)
    assert spread.app.config()['NOTED'] and 'NOTED' not in spread.app.live().config
    assert spread.app.live().machines == [place[0] for place in PLACES[:2]]
    assert [spread.services[name]['count'] for name in ('blog--1', 'blog--2')] == [0, 2]
    dh.spread_anew(spread.host)
    assert spread.app.live().number == 2
    spread.nodes['web3'] = web3
    dh.spread_anew(spread.host)
    assert spread.app.live().number == 3 and len(spread.app.live().machines) == 3
    dh.cmd_recover(spread.host)
    assert spread.app.live().number == 3

    dh.cmd_config(spread.app, 'machines=3')
    del spread.nodes['web3']
    dh.spread_anew(spread.host)
    assert 'dockhand: blog: machines=3, and there are 2: dockhand config blog machines=2' in (
        capfd.readouterr().err)
    spread.app.save_config({'machines': 'all'})
    dh.cmd_stop(spread.app)
    dh.spread_anew(spread.host)
    assert spread.app.live().number == 4 and spread.app.is_stopped()

def test_a_rollback_leads_where_it_runs_now(spread):
    spread.nodes['web4'] = dict(spread.nodes['web3'], address='192.0.2.14', labels={},
                                images={})
    del spread.nodes['web3']
    dh.spread_anew(spread.host)
    dh.cmd_rollback(spread.app, '1')
    live, now = spread.app.live(), ['192.0.2.11', '192.0.2.12', '192.0.2.14']
    assert live.number == 1 and live.machines == now
    text = spread.read('/etc/nginx/conf.d/blog.conf')
    assert text == live.proxy and '192.0.2.13' not in text
    assert sorted(task[1] for task in spread.tasks()) == now

    for name in ('web2', 'web4'):
        del spread.nodes[name]
    assert refusal(dh.cmd_rollback, spread.app, '2') == (
        'no other machine took its image: none may run anything (dockhand machines)')

def test_a_release_that_died_once_can_be_gone_back_to(spread):
    spread.services['blog--1']['ended'] = ['web2']
    spread.push(TWO_TYPES)
    dh.cmd_rollback(spread.app)
    assert spread.app.live().number == 1 and len(spread.tasks()) == 3

def test_nothing_runs_on_a_machine_that_nginx_does_not_ask(spread):
    dh.cmd_config(spread.app, 'machines=2')
    spread.nodes['web4'] = {'address': '192.0.2.14', 'labels': {}, 'images': {},
                            'state': 'ready', 'may': 'active'}
    dh.cmd_recover(spread.host)
    assert spread.nodes['web4']['labels'] == {}
    assert not [row for row in dh.machine_problems(spread.host) if 'lacks' in row[0]]
    spread.push(TWO_TYPES)
    assert sorted(spread.nodes['web4']['labels']) == ['dockhand.blog.3']

def test_an_image_that_was_pruned_on_a_machine_is_brought_again(spread):
    dh.cmd_stop(spread.app)
    spread.nodes['web2']['images'].clear()
    dh.cmd_recover(spread.host)
    assert sorted(spread.nodes['web2']['images']) == ['blog:1']

def test_a_machine_that_is_removed_is_left_first(spread, capfd):
    dh.cmd_config(spread.app, 'machines=3')
    assert refusal(dh.cmd_machines, spread.host, 'remove', 'web3') == (
        'blog runs on 3 machines, and 2 would be left; first: dockhand config blog machines=2')
    dh.cmd_config(spread.app, 'machines=2')
    del spread.done[:]
    dh.cmd_machines(spread.host, 'remove', 'web3')
    states = [line.rpartition(' ')[0] for line in spread.done if '--availability' in line]
    assert states == ['docker node update --availability pause',
                      'docker node update --availability drain']
    done = '\n'.join(spread.done)
    assert done.index('pause') < done.index('kill') < done.index('drain')
    assert sorted(spread.nodes) == ['front', 'web2']
    assert spread.app.live().machines == [place[0] for place in PLACES[:2]]
    assert '192.0.2.13' not in spread.read('/etc/nginx/conf.d/blog.conf')

    assert 'web2 is the last one, and blog runs there; first: ' in refusal(
        dh.cmd_machines, spread.host, 'remove', 'web2')
    dh.cmd_config(spread.app, 'machines', unset=True)
    dh.cmd_machines(spread.host, 'remove', 'web2')
    assert not spread.host.machines.are_any() and spread.nodes == {}
    assert [each.get('also') for each in spread.containers.values()
            if each['State']['Running']] == [[], []]
    spread.push(TWO_TYPES)

def test_a_crontab_knows_the_network_that_is_there(spread):
    spread.app.save_config({})
    spread.push(dict(TWO_TYPES, crontab='@daily true\n'))
    script = '/var/lib/dockhand/apps/blog/live/cron'
    assert '--net=dockhand--machines ' in spread.read(script)
    for name in ('web2', 'web3'):
        dh.cmd_machines(spread.host, 'remove', name)
    assert '--net=dockhand ' in spread.read(script)

    spread.write(dh.MACHINES, '10.87\n')        # as a kill just after leaves it
    spread.nodes['front'] = {'address': '192.0.2.11', 'labels': {}, 'images': {},
                             'state': 'ready', 'may': 'active'}
    dh.cmd_recover(spread.host)
    assert '--net=dockhand--machines ' in spread.read(script)

def test_more_machines_than_three_are_no_deaths(spread):
    """Each task comes at another moment."""
    live = spread.app.live()
    for number in range(4, 9):
        spread.nodes['web%d' % number] = dict(
            spread.nodes['web2'], address='192.0.2.%d' % (10 + number))
        spread.services['blog--1']['count'] = number
    seen, engine = set(), dh.engine_of(spread.app, live)
    for count in range(1, 8):
        spread.services['blog--1']['count'] = count
        seen.add(engine.state(dh.front_of(live)).identity)
    assert len(seen) == 1

def test_where_no_other_machine_takes_the_image_nothing_changes(spread):
    before = spread.whole()
    for name in ('web2', 'web3'):
        spread.nodes[name]['state'] = 'down'
    assert 'no other machine took its image: web2 is down; web3 is down' in refusal(
        spread.push, TWO_TYPES)
    assert spread.changed(before) == []

@pytest.mark.parametrize('routed, name, said', [
    ('local 10.0.0.2 dev lo src 10.0.0.2', 'web2', '10.0.0.2 is this server itself'),
    ('', 'web2', 'no route leads from here to 10.0.0.2'),
    ('10.0.0.2 dev eth0 src 10.0.0.1', 'front', 'another machine is called front')])
def test_a_machine_is_another_one_with_a_name_of_its_own(routed, name, said):
    def run(argv):
        if argv[0] == 'ip':
            return Result(0, routed + '\n', '')
        own = name if argv[0] == 'ssh' else 'front'
        return Result(0, json.dumps(dict(DOCKER_INFO, Name=own)), '')
    assert said in refusal(dh.add_machine, Host('/nowhere', run), 'root@10.0.0.2')

def test_a_manager_that_does_not_come_is_waited_for_once(spread):
    spread.broken['docker node ls'] = 10 ** 9
    for _ in range(3):
        assert 'docker node ls -q failed' in refusal(spread.host.machines.all)
    assert spread.host.machines.patience == 0
    spread.broken['docker node ls'] = 0
    assert len(spread.host.machines.all()) == 3
    spread.host.machines.patience = 5
    spread.broken['docker node ls'] = 3
    assert len(spread.host.machines.all()) == 3

def test_an_app_comes_back_to_the_front_alone(spread):
    dh.cmd_config(spread.app, 'machines', unset=True)
    assert spread.containers['blog--2']['State']['Running']
    assert spread.services['blog--1']['count'] == 0
    assert spread.app.live().machines == []
    assert 'server 10.86.' in spread.read('/etc/nginx/conf.d/blog.conf')

@pytest.mark.parametrize('files, config, said', [
    (an_app('two', 'EXPOSE 8000\nVOLUME /x'), {}, 'machines: its VOLUME /x is on one'),
    (an_app('two', ''), {}, 'machines is for web apps'),
    (TWO_WEB, {'scale': 'web=2'}, 'scale counts web, which runs once on each machine'),
    (TWO_WEB, {'options': '-v /a:/b'}, 'options: `--volume=/a:/b` cannot be had on sev'),
    (FILES_2, {}, 'machines is for apps without a job')])
def test_what_cannot_run_on_several_machines_is_refused(spread, files, config, said):
    spread.app.save_config(dict({'machines': '2'}, **config))
    before = spread.whole()
    assert said in refusal(spread.push, files)
    assert spread.changed(before) == []

def test_machines_that_are_not_there_are_refused_with_what_to_type(plain):
    plain.lives(ONE_WEB)
    assert 'there are none: dockhand machines add root@ADDRESS' in refusal(
        dh.cmd_config, plain.app, 'machines=2')
    assert plain.app.live().number == 1 and plain.app.config() == {}

# ---- Drained ---------------------------------------------------------------------------

# The old release of a web app goes once no request can reach it.

def ss_lines(sockets, form='(("nginx",pid=%s,fd=9))'):
    """What `ss -tanp` prints of {(state, local, peer): [process id]}."""
    return SS_HEAD + ''.join('%-10s 0 128 %20s %20s %s\n' % (key + (
        pids and 'users:' + ','.join(form % pid for pid in pids),))
        for key, pids in sorted(sockets.items()))

LISTEN, LISTEN_6 = ('LISTEN', '0.0.0.0:80', '0.0.0.0:*'), ('LISTEN', '[::]:80', '[::]:*')
CLIENT = ('ESTAB', '192.0.2.1:80', '198.51.100.9:4000')
CLIENT_6 = ('ESTAB', '[2001:db8::1]:80', '[2001:db8::9]:4001')
TO_OLD = ('ESTAB', '10.86.0.1:5001', '10.86.0.2:8000')
TO_NEW = ('ESTAB', '10.86.0.1:5002', '10.86.0.20:8000')
LATE, OVER = ('CLOSE-WAIT',) + CLIENT[1:], ('TIME-WAIT',) + CLIENT[1:]
GOING = 'worker process is shutting down'

@pytest.mark.parametrize('form', ['(("nginx",pid=%s,fd=9))', '(("nginx",%s,9))'])
@pytest.mark.parametrize('title, held, drained', [
    ('worker process', [CLIENT, TO_OLD], True),     # takes new requests, for the new one
    (GOING, [], True),
    (GOING, [CLIENT, TO_OLD], False),               # a request, or a websocket
    (GOING, [CLIENT], False),                       # sent after its connection
    (GOING, [LATE], False),
    (GOING, [CLIENT_6], False),                     # the same over IPv6
    (GOING, [CLIENT, TO_NEW], True),                # of another app
    (GOING, [CLIENT_6, TO_NEW], True),
    (GOING, [CLIENT, CLIENT_6, TO_NEW], False),     # one of two may come here
    (GOING, [TO_OLD], False),
    (GOING, [TO_NEW], True)])
def test_an_old_release_is_drained_when_no_request_can_reach_it(
        plain, form, title, held, drained):
    plain.nginx()
    sockets = dict.fromkeys([LISTEN, LISTEN_6], [50, 59])
    sockets.update({CLIENT: [59], CLIENT_6: [600], TO_OLD: [6], TO_NEW: [6], OVER: []})
    sockets.update((each, [60]) for each in held)
    plain.sockets = ss_lines(sockets, form)
    plain.process(60, 50, 'nginx: ' + title)
    assert plain.host.nginx.is_drained([('10.86.0.2', 8000)]) is drained
    for other in (('10.86.0.9', 8000), ('10.86.0.2', 8001)):
        assert plain.host.nginx.is_drained([other]) is (
            drained or held in ([CLIENT, TO_OLD], [TO_OLD]))

def test_workers_of_another_nginx_do_not_count(plain):
    plain.nginx()
    plain.sockets = ss_lines({LISTEN: [59], CLIENT: [60], TO_OLD: [60]})
    plain.process(60, 1, 'nginx: ' + GOING)
    assert plain.host.nginx.is_drained([('10.86.0.2', 8000)])

def test_ss_of_this_machine_tells_who_holds_a_connection():
    server = socket.socket()
    server.bind(('127.0.0.1', 0))
    server.listen(1)
    client = socket.create_connection(server.getsockname())
    rows = [line.split() for line in Host().run(['ss', '-tanp']).splitlines()]
    peer, own = ['%s:%d' % each for each in (client.getpeername(), client.getsockname())]
    found = [row for row in rows if row[3:5] == [own, peer]]
    assert [row[0] for row in rows if row[3] == peer][:1] == ['LISTEN']
    assert len(found) == 1 and re.search(r',(pid=)?%d,' % os.getpid(), found[0][-1])
    client.close()
    server.close()

def test_the_old_release_is_stopped_once_it_is_drained(plain):
    plain.lives(ONE_WEB)
    plain.nginx()
    reload = plain.nginx_s

    def reload_with_a_late_request(*words):
        reload(*words)
        plain.sockets = late
        threading.Timer(0.1, setattr, [plain, 'sockets', SS_HEAD]).start()
    late = ss_lines({LISTEN: [50], CLIENT: [51]})
    plain.nginx_s, stopped = reload_with_a_late_request, []
    stop = plain.docker_stop
    plain.docker_stop = lambda *words: (
        stopped.append(plain.sockets == late) or stop(*words))
    plain.push(TWO_WEB)
    assert stopped == [False]

# ---- One app ends where the next begins ------------------------------------------------

# What a push may not do to its neighbours, nor tell of them.

WIKI_FILE = ("# dockhand: wiki's proxy file, x\n"
             'server { listen 80; server_name wiki.org wiki.*; }\n')

def with_wiki(machine):
    """Another app's proxy file beside the one under test."""
    machine.write('/etc/nginx/conf.d/wiki.conf', WIKI_FILE)
    machine.lives(FILES)
    return machine

@pytest.mark.parametrize('now, is_refused', [
    ('403', True), ('401', True), ('404', True), ('400', True), ('', True), ('444', True),
    ('502', False), ('500', False), ('200', False), ('302', False)])
def test_a_push_with_which_another_app_answers_no_more_is_put_back(
        plain, now, is_refused):
    with_wiki(plain)
    before, reload = plain.whole(), plain.nginx_s

    def reloads(*words):
        reload(*words)
        new = 'www.example' in str(plain.served)
        plain.answers = {'wiki.org': now} if new else {}
    plain.nginx_s = reloads
    if is_refused:
        assert 'another app answers' in refusal(plain.push, FILES_2)
        assert plain.changed(before) == []
    else:
        plain.push(FILES_2)
        assert plain.running() == ['sha256:FROMtwo']

@each('before', '403 401 404 400 444')
def test_an_app_that_answered_so_before_is_not_held_against_a_push(plain, before):
    with_wiki(plain)
    plain.answers = {'wiki.org': before}
    plain.push(FILES_2)
    assert plain.running() == ['sha256:FROMtwo']

def test_a_file_that_leans_on_what_another_app_defines_is_refused(plain):
    with_wiki(plain)
    plain.write('/etc/nginx/conf.d/wiki.conf',
                WIKI_FILE + 'upstream wiki { server a; }\n')
    said = refusal(plain.push,
                   but('proxy', WEB.replace('root /x', 'proxy_pass http://wiki')))
    assert said == ('nginx-proxy.conf:1: proxy_pass http://wiki '
                    "(it must not lean on another app's file)")
    assert plain.running() == ['sha256:FROMone']

@table('name, said', '''
    wiki.net => "wiki.net" would take requests from wiki, which has "wiki.*": give that
    *.net    => "*.net" would take requests from wiki, which has "wiki.*"
    wiki.org => server_name "wiki.org" is taken on port 80, by /etc/nginx/conf.d/wiki''')
def test_a_key_without_the_right_to_an_app_is_told_the_host_name_alone(plain, name, said):
    with_wiki(plain)
    files = but('proxy', WEB.replace('blog.example.org', name))
    assert said in refusal(plain.push, files)
    plain.write('/home/git/' + dh.KEYS, keys_text(
        Key('ssh-ed25519', 'AAAA', 'anna', ('blog',))))
    told = refusal(plain.push, files)
    assert 'wiki.*' not in told and 'wiki.conf' not in told and name in told

def test_a_rule_that_is_newer_than_a_release_binds_pushes_and_warns_else(plain, capfd):
    """The files of release 1 and 2 were taken by an earlier dockhand."""
    plain.lives(but('proxy', 'deny all;\n' + WEB))
    live = plain.app.live()
    plain.push(but('docker', 'FROM three'))
    capfd.readouterr()
    dh.cmd_rollback(plain.app)
    assert plain.app.live().number == live.number
    note = 'Note: nginx-proxy.conf:1: `deny all`: outside of `server { }`'
    assert note in capfd.readouterr().err
    dh.cmd_config(plain.app, 'A=1')
    assert plain.app.live().config == {'A': '1'}
    files = but('proxy', 'deny all;\n' + WEB)
    assert 'nginx-proxy.conf:1: `deny all`: outside' in refusal(
        lambda: plain.push(dict(files, Dockerfile='FROM four'), new=SHA_3))

# ---- Recovering ------------------------------------------------------------------------

# What a crash, a power cut or a prune left is put right.

DOCKER_PROXY = ('docker-proxy -proto tcp -host-ip %s -host-port 8000 '
                '-container-ip 172.17.0.2')
PUBLISHED_8000 = {'Ports': {'80/tcp': [{'HostIp': '', 'HostPort': '8000'}],
                            '81/tcp': None}}

@table('init, said', """
    systemd =>
    upstart =>
    none    => docker keeps port 8000 for no container: restart it, then""")
def test_recover_ends_what_docker_keeps_for_no_container(tmpdir, init, said):
    machine = Machine(tmpdir, init)
    machine.lives(FILES)
    machine.write('/run/docker.pid', '40\n')
    machine.process(60, 40, (DOCKER_PROXY % '::').replace(' ', '\0'))
    if said:
        assert refusal(machine.host.docker.free_ports, 0).startswith(said)
    else:
        machine.host.docker.free_ports(0)
    assert machine.done == ([] if said else ['service docker restart'])

def test_recover_waits_for_a_container_that_docker_is_starting(tmpdir):
    machine = Machine(tmpdir, 'systemd')
    machine.lives(FILES)
    machine.write('/run/docker.pid', '40\n')
    machine.process(60, 40, (DOCKER_PROXY % '::').replace(' ', '\0'))
    starting, inspected = machine.containers['blog--1'], machine.docker_inspect
    starting['NetworkSettings'], starting['State']['Running'] = PUBLISHED_8000, False

    def once_started(*words):       # docker answers when it is done with the start
        starting['State']['Running'] = True
        return inspected(*words)
    machine.docker_inspect = once_started
    machine.host.docker.free_ports(0)
    assert machine.done == []

@pytest.mark.parametrize('parent, settings', [(40, PUBLISHED_8000), (41, {})])
def test_recover_leaves_the_ports_of_containers_and_of_other_engines(
        tmpdir, parent, settings):
    machine = Machine(tmpdir, 'systemd')
    machine.lives(FILES)
    machine.write('/run/docker.pid', '40\n')
    machine.process(60, parent, (DOCKER_PROXY % '0.0.0.0').replace(' ', '\0'))
    machine.containers['blog--1']['NetworkSettings'] = settings
    dh.cmd_recover(machine.host)
    assert not [line for line in machine.done if 'service' in line]

def test_a_crash_after_the_commit_point_keeps_the_new_release(machine):
    new = half_deployed(machine)
    machine.app.set_link('live', new)
    dh.cmd_recover(machine.host)
    assert machine.running() == ['sha256:FROMtwo']
    live = machine.app.live()
    assert live == new._replace(seconds=live.seconds) and live.seconds > 1
    assert machine.refs['refs/heads/main'] == SHA_2
    assert not re.search('pending|override', str(machine.files()))
    assert machine.init == 'upstart' or (
        machine.containers['blog--2']['policy'] == 'always')

def test_a_power_cut_after_the_commit_point_is_followed_by_a_start(machine):
    machine.app.set_link('live', half_deployed(machine))
    machine.jobs.clear()
    for container in machine.containers.values():
        container['State']['Running'] = False
    dh.cmd_recover(machine.host)
    assert machine.running() == ['sha256:FROMtwo']
    assert not re.search('pending|override', str(machine.files()))

def test_what_is_still_to_be_put_back_is_neither_cleaned_up_nor_forgotten(plain):
    plain.lives(FILES)
    plain.broken['docker start'] = 9
    assert refusal(plain.push, FILES_2)
    dh.after_push(plain.app, None)
    plain.broken['docker start'] = 1
    dh.cmd_start(plain.app)
    assert plain.app.linked('pending').number == 2
    dh.cmd_recover(plain.host)
    assert plain.app.linked('pending') is None
    assert plain.running() == ['sha256:FROMone']

def test_what_is_left_of_a_removal_that_was_killed_keeps_no_other_app_down(plain, capfd):
    plain.lives(FILES)
    shutil.rmtree(plain.app.release_folder(1))
    dh.cmd_recover(plain.host)
    dh.cmd_apps(plain.host)
    assert not re.search('live|releases', str(plain.files('/home')))
    assert capfd.readouterr().out == ''

def test_a_crash_in_a_first_build_leaves_nothing_once_recovered(machine):
    machine.nginx()
    machine.host.nginx.restore('blog', None)
    dh.make_folder(machine.host.path('/var/lib/dockhand/apps'))
    before = machine.whole()
    machine.release(1, SHA, FILES)
    dh.cmd_recover(machine.host)
    assert set(machine.changed(before)) == records_of(1)
    assert machine.app.load(1).failed == 'interrupted'

def test_a_branch_that_a_crash_left_behind_is_set_to_what_is_live(plain):
    plain.lives(FILES)
    plain.refs['refs/heads/main'] = SHA_3
    plain.write('/home/git/blog.git/refs/heads/main.lock', '')
    assert 'another push went live' in refusal(lambda: plain.push(FILES_2, old=SHA_3))
    assert plain.refs['refs/heads/main'] == SHA
    assert plain.running() == ['sha256:FROMone']
    assert plain.read('/home/git/blog.git/refs/heads/main.lock') is None

def test_a_stopped_app_is_not_started_by_recover_a_dead_container_is(machine):
    machine.lives(FILES)
    dh.cmd_stop(machine.app)
    assert machine.running() == []
    dh.cmd_recover(machine.host)
    assert machine.running() == []
    os.unlink(machine.app.folder('stopped'))
    dh.cmd_recover(machine.host)
    assert machine.running() == ['sha256:FROMone']

PROXY_FILE = '/etc/nginx/conf.d/blog.conf'
CLOSED = '''server {
    # dockhand: the app is stopped, until a start or a push
    add_header Retry-After 60 always;
    return 503;
'''

@pytest.mark.parametrize('version, header', [
    ((1, 4, 6), ''), ((1, 7, 4), ''),
    ((1, 7, 5), '    add_header Retry-After 60 always;\n'),
    ((1, 29, 7), '    add_header Retry-After 60 always;\n')])
def test_the_file_of_a_stopped_app_passes_nothing_on(version, header):
    text = plain_proxy(1)
    assert dh.closed_proxy(text, version) == text.replace('server {\n', CLOSED.replace(
        '    add_header Retry-After 60 always;\n', header), 1)

def test_a_stopped_app_is_closed_until_it_is_started(plain):
    live = plain.lives(ONE_WEB)
    before = plain.whole()
    dh.cmd_stop(plain.app)
    closed = live.proxy.replace('server {\n', CLOSED, 1)
    assert plain.served == {PROXY_FILE: closed}
    assert plain.app.live().proxy == live.proxy         # what is recorded is as it was
    dh.cmd_stop(plain.app)
    dh.cmd_recover(plain.host)
    assert plain.served == {PROXY_FILE: closed} and plain.running() == []
    dh.cmd_start(plain.app)
    assert plain.changed(before) == [] and plain.served == {PROXY_FILE: live.proxy}

@each('act', 'push config rollback restart')
def test_what_makes_a_stopped_app_run_opens_it(plain, act):
    plain.lives(ONE_WEB)
    plain.push(TWO_WEB)
    dh.cmd_stop(plain.app)
    if act == 'push':
        plain.push(an_app('three'), old=SHA_2, new=SHA_3)
    elif act == 'config':
        dh.cmd_config(plain.app, 'A=1')
    else:
        {'rollback': dh.cmd_rollback, 'restart': dh.cmd_restart}[act](plain.app)
    assert plain.served == {PROXY_FILE: plain.app.live().proxy}
    assert len(plain.running()) == 1 and not plain.app.is_stopped()

def test_a_push_to_a_stopped_app_that_fails_leaves_it_closed(plain):
    live = plain.lives(ONE_WEB)
    dh.cmd_stop(plain.app)
    closed = plain.app.proxy_when_stopped(live)
    assert refusal(plain.push, an_app('dies'))
    assert plain.served == {PROXY_FILE: closed}
    plain.app.set_link('pending', plain.release(3, SHA_3, TWO_WEB))    # and after a crash
    plain.write(PROXY_FILE, plain.app.load(3).proxy)
    dh.cmd_recover(plain.host)
    assert plain.served == {PROXY_FILE: closed} and plain.running() == []

@pytest.mark.parametrize('stopped', [True, False])
def test_a_crash_between_a_state_and_its_proxy_file_is_put_right(plain, capfd, stopped):
    live = plain.lives(ONE_WEB)
    upload(plain, LINE, 'anna')
    dh.cmd_install(plain.host)
    dh.cmd_stop(plain.app)
    closed = plain.app.proxy_when_stopped(live)
    if stopped:
        plain.write(PROXY_FILE, live.proxy)         # no longer open, not yet closed
    else:
        dh.cmd_start(plain.app)
        plain.write(PROXY_FILE, closed)
    dh.check_edited(plain.app, live, live)          # nobody changed it on the server

    capfd.readouterr()
    assert refusal(dh.cmd_doctor, plain.host)
    assert capfd.readouterr().out == ('WRONG  the proxy file of blog is not in place\n'
                                      '       type: sudo dockhand recover\n')
    dh.cmd_recover(plain.host)
    assert plain.served == {PROXY_FILE: closed if stopped else live.proxy}
    assert len(plain.running()) == (not stopped)
    dh.cmd_doctor(plain.host)

@each('state', 'running stopped')
def test_a_proxy_file_that_a_person_changed_stays_at_a_stop_and_a_start(plain, state):
    live = plain.lives(ONE_WEB)
    if state == 'stopped':
        dh.cmd_stop(plain.app)
    edited = plain.read(PROXY_FILE) + '# by hand\n'
    plain.write(PROXY_FILE, edited)
    dh.cmd_stop(plain.app)
    dh.cmd_recover(plain.host)
    dh.cmd_start(plain.app)
    assert plain.read(PROXY_FILE) == edited
    assert 'to keep that, commit it' in refusal(dh.check_edited, plain.app, live, live)

def test_a_pushed_proxy_file_stays_as_it_is_while_the_app_is_stopped(plain):
    live = plain.lives(an_app('one', 'EXPOSE 8000', PUSHED))
    dh.cmd_stop(plain.app)
    assert plain.served == {PROXY_FILE: live.proxy} and plain.running() == []

def test_an_app_is_stopped_and_started_though_nginx_follows_at_the_second_try(
        plain, capfd):
    live = plain.lives(ONE_WEB)
    plain.broken['nginx -s'] = 1
    dh.cmd_stop(plain.app)
    assert plain.running() == [] and plain.app.is_stopped()
    assert ('dockhand: nginx goes on passing requests to it: nginx -s reload failed'
            in capfd.readouterr().err)
    assert plain.served == {PROXY_FILE: live.proxy}
    dh.cmd_stop(plain.app)
    assert plain.served == {PROXY_FILE: plain.app.proxy_when_stopped(live)}

    plain.broken['nginx -s'] = 1
    assert 'nginx -s reload failed' in refusal(dh.cmd_start, plain.app)
    assert plain.app.is_stopped()
    dh.cmd_start(plain.app)
    assert plain.served == {PROXY_FILE: live.proxy} and not plain.app.is_stopped()

@table('stanzas, runs', r'''
    start on started docker                      => yes
    start on filesystem and started docker       => yes
    start on runlevel [2345]\nstop on shutdown   => yes
    manual\nstart on started docker              => yes
    respawn                                      => no
    stop on stopping docker                      => no
    start on started docker\nmanual              => no''')
def test_recover_starts_a_job_that_is_down_if_something_starts_it(tmpdir, stanzas, runs):
    """init does so only when its events come again, and those of a boot do not."""
    machine = Machine(tmpdir, 'upstart')
    machine.lives(dict(FILES, **{'upstart.conf': stanzas.replace('\\n', '\n') +
                                 '\nexec docker run --rm blog\n'}))
    files = machine.files()
    for stopped in (False, True):
        machine.containers.clear(), machine.jobs.clear()
        dh.cmd_recover(machine.host)
        assert machine.running() == ['sha256:FROMone'] * (runs == 'yes' and not stopped)
        assert stopped or machine.files() == files
        dh.cmd_stop(machine.app)

def test_what_is_gone_of_a_live_release_is_brought_back(machine):
    machine.lives(FILES)
    before = machine.whole()
    del machine.images['blog:latest']
    machine.containers.clear()
    machine.jobs.clear()
    for path in ('/etc/nginx/conf.d/blog.conf', '/etc/init/blog.conf'):
        dh.remove_file(machine.host.path(path))
    for _ in range(2):
        dh.cmd_recover(machine.host)
        assert machine.changed(before) == []

def test_recover_goes_on_with_the_next_app(plain, capfd):
    plain.lives(FILES)
    live, alone = plain.app.live()._replace(app='alone'), dh.App(plain.host, 'alone')
    alone.save(live)
    alone.set_link('live', live)
    plain.images.clear()
    assert refusal(dh.cmd_recover, plain.host) == '2 app(s) could not be put right'
    assert re.findall('dockhand: (.*)', capfd.readouterr().err) == [
        '%s: the image of release 1 is gone: sudo dockhand rebuild %s' % (app, app)
        for app in ('alone', 'blog')]

def test_a_network_that_was_pruned_is_made_again_as_it_was(plain):
    plain.docker_network('network', 'create', '--subnet=10.99.0.0/16', 'dockhand')
    plain.lives(ONE_WEB)
    before = plain.whole()
    plain.docker_stop('', '-t', '1', 'blog--1')
    plain.networks.clear()
    dh.cmd_recover(plain.host)
    assert plain.networks['dockhand']['IPAM']['Config'][0]['Subnet'] == '10.99.0.0/16'
    assert plain.changed(before) == []
    plain.networks.clear()
    plain.containers.clear()
    assert dh.free_addresses(plain.host, 1) == ['10.99.0.3']
    dh.cmd_recover(plain.host)
    assert plain.changed(before) == []

def test_recover_mends_an_app_whose_live_commit_is_a_tag(plain):
    live = plain.lives(FILES)
    plain.app.save_record(live._replace(commit=SHA_2))
    plain.commits[SHA_2], plain.kinds[SHA_2], plain.named = FILES, 'tag', SHA_3
    plain.commits[SHA_3] = FILES_2
    dh.cmd_recover(plain.host)
    assert plain.app.live().commit == SHA_3 == plain.refs[MAIN]
    plain.history.add((SHA_3, SHA))
    plain.push(FILES_2, old=SHA_3, new=SHA)
    assert plain.app.live().number == 2

def test_recover_starts_nginx_and_waits_for_no_job_that_waits_for_it(tmpdir):
    machine = Machine(tmpdir, 'systemd')
    machine.lives(FILES)
    os.unlink(machine.host.path('/run/nginx.pid'))
    dh.cmd_recover(machine.host)
    assert [line for line in machine.done if 'start nginx' in line] == [
        'systemctl --no-block start nginx']
    assert machine.host.nginx.master()

def test_recover_waits_until_docker_answers(plain, capfd):
    plain.lives(FILES)
    plain.broken['docker version'] = 3
    dh.cmd_recover(plain.host)
    assert capfd.readouterr().err.count('Waiting for docker') == 1
    plain.broken['docker version'] = 999
    assert 'docker does not answer' in refusal(dh.cmd_recover, plain.host)

# ---- Deploying -------------------------------------------------------------------------

# From a push to a release: what is refused before anything changes.

def test_what_lies_where_a_commit_is_built_is_removed(machine):
    machine.lives(FILES)
    os.symlink('/nowhere', machine.host.path('/var/lib/dockhand/build/blog'))
    machine.push(FILES_2)
    assert machine.running() == ['sha256:FROMtwo']

@pytest.mark.parametrize('name, text, said', [
    ('docker', None, 'no Dockerfile in this commit'), ('docker', '\n', 'file is empty'),
    ('docker', 'a\0', 'file holds a NUL byte'), ('job', '', 'upstart.conf is empty'),
    ('docker', 'x' * (256 * 1024 + 1), 'Dockerfile is larger than 256 KB'),
    ('job', JOB + 'x\n', 'upstart.conf:3: `x`: an unknown stanza'),
    ('job', 'exec docker run -d blog', 'upstart.conf:1: `-d`'),
    ('proxy', dh.to_text(b'\xef\xbb\xbf') + WEB,
     'nginx-proxy.conf:1: begins with a byte'),
    ('proxy', '\n\nserver { server_name a; broken; }\n', 'nginx-proxy.conf:3: broken'),
    ('proxy', 'server { listen 80; }', 'nginx-proxy.conf:1: no request reaches this'),
    ('proxy', '\nserver { server_name wiki.org; }', 'nginx-proxy.conf:2: server_name '
     '"wiki.org" is taken on port 80, by /etc/nginx/conf.d/wiki.conf:1'),
    ('docker', 'RUN fail', 'the build failed')])
def test_a_push_refused_before_the_switch_changes_nothing(machine, name, text, said):
    machine.write('/etc/nginx/conf.d/wiki.conf', 'server { server_name wiki.org; }')
    machine.lives(FILES)
    before, containers = machine.whole(), str(machine.containers)
    assert said in refusal(machine.push, but(name, text))
    assert machine.changed(before) == [] and str(machine.containers) == containers
    assert said in refusal(machine.push, but(name, text))
    assert not [line for line in machine.done if line.startswith(('docker s', 'stop'))]

@each('name', 'Dockerfile upstart.conf nginx-proxy.conf .dockerignore .gitattributes')
def test_a_pushed_file_that_is_a_link_or_a_folder_is_refused(tmpdir, name):
    os.symlink('/etc/passwd', str(tmpdir.join(name)))
    assert name + ' is a link: commit' in refusal(dh.read_pushed, str(tmpdir), name)
    tmpdir.join(name).remove()
    os.mkdir(str(tmpdir.join(name)))
    assert name + ' is a folder: commit' in refusal(dh.read_pushed, str(tmpdir), name)

@pytest.mark.parametrize('data', [b'FROM a\r\n', b'FROM a', b'# \xff\n', b'x' * 2 ** 18])
def test_a_pushed_file_is_read_as_it_is(tmpdir, data):
    tmpdir.join('Dockerfile').write_binary(data)
    assert dh.to_bytes(dh.read_pushed(str(tmpdir), 'Dockerfile')) == data
    assert dh.read_pushed(str(tmpdir), 'upstart.conf') is None

class Git(object):
    """A bare repository of blog, and git itself, which this account runs: it may be hurt
    by nothing but what is written into it here. asked: the verbs that it was given"""
    def __init__(self, root):
        self.root, self.asked = str(root), []
        self.app = dh.App(Host(self.root, self.ask), 'blog')
        for folder in ('etc', 'home/git', 'var/lib/dockhand/build'):
            os.makedirs(os.path.join(self.root, folder))
        passwd = 'git:x:%d:%d::/home/git:/bin/sh\n' % (USER, GROUP)
        dh.replace_file(self.app.host.path('/etc/passwd'), passwd)
        dh.execute(['git', 'init', '-q', '--bare', self.app.repository()])

    def ask(self, argv, account=None, **options):
        self.asked.append([word for word in argv[1:] if not word.startswith('-')][0])
        return dh.execute(argv, **options)

    def write(self, kind, data):
        """Write an object; its id, as bytes of 20."""
        whole = b'%s %d\0' % (kind, len(data)) + data
        name = hashlib.sha1(whole).hexdigest()
        folder = os.path.join(self.app.repository(), 'objects', name[:2])
        dh.make_folder(folder)
        with open(os.path.join(folder, name[2:]), 'wb') as target:
            target.write(zlib.compress(whole, 1))
        return hashlib.sha1(whole).digest()

    def tree(self, id_, mode, *names):
        """A folder with the same thing under several names."""
        return self.write(b'tree', b''.join(
            b'%s %s\0' % (mode, name) + id_ for name in sorted(names)))

    def commit(self, tree):
        """The id of a commit of a folder."""
        text = 'tree %s\nauthor a <a> 1 +0000\ncommitter a <a> 1 +0000\n\nx\n'
        id_ = self.write(b'commit', dh.to_bytes(
            text % dh.to_text(binascii.hexlify(tree))))
        return dh.to_text(binascii.hexlify(id_))

TEN = [b'%d' % number for number in range(10)]

def nested(git, id_, mode, levels, *names):
    """A folder in a folder and so on, each holding the next one under all the names."""
    for _ in range(levels):
        id_, mode = git.tree(id_, mode, *names), b'40000'
    return id_

@table('what, said', """
    files   => more than 100000 files and folders
    folders => more than 100000 files and folders
    deep    => a path in this commit is longer than 2000 characters
    long    => more than 100000 files and folders
    large   => MB, so much is not free on /var/lib/dockhand""")
def test_a_commit_that_would_never_be_checked_out_is_refused_by_its_list(
        tmpdir, what, said):
    git = Git(tmpdir)
    blob, empty = git.write(b'blob', b'x'), git.write(b'tree', b'')
    names = [b'n' * 30 + b'%d' % number for number in range(17)]
    large = git.write(b'blob', b'\0' * 2 ** 26) if what == 'large' else None
    tree = {'files': lambda: nested(git, blob, b'100644', 9, *TEN),
            'folders': lambda: nested(git, empty, b'40000', 9, *TEN),
            'deep': lambda: nested(git, blob, b'100644', 20000, b'a'),
            'long': lambda: nested(git, blob, b'100644', 17, *names[:2]),
            'large': lambda: nested(git, large, b'100644', 4, *names)}[what]()
    commit = git.commit(tree)
    with ending(60):
        with pytest.raises(Failure) as refused:
            with dh.undone_by(git.app.empty_build_folder):
                dh.check_out(git.app, commit)
    assert said in str(refused.value)
    assert git.asked == ['ls-tree']
    assert dh.list_folder(git.app.host.path('/var/lib/dockhand/build')) == []

def test_a_commit_of_as_many_files_as_may_be_is_taken():
    limits = dh.TreeLimits(10 ** 12)
    for number in range(dh.MOST_PATHS):
        limits('100644 blob %s       1\t%d' % (SHA, number))
    assert 'more than 100000' in refusal(limits, '100644 blob %s       1\tx' % SHA)

def test_a_commit_that_git_cannot_list_is_refused_with_its_words(tmpdir):
    git = Git(tmpdir)
    commit = git.commit(b'\x11' * 20)
    assert 'git cannot list this commit: fatal: ' in refusal(
        dh.check_tree, git.app, commit)

@each('mode', '100644 100755 120000 160000')
def test_whatever_git_keeps_is_counted_once(tmpdir, mode):
    git = Git(tmpdir)
    tree = git.tree(git.write(b'blob', b'x'), dh.to_bytes(mode), b' a\tb\n\xff ', b'c')
    dh.check_tree(git.app, git.commit(tree))

@pytest.mark.parametrize('files, said', [
    (dict(('f%05d' % number, '') for number in range(100001)), 'more than 100000 files'),
    ({'x' * 2001: ''}, 'longer than 2000')], ids=['many', 'long'])
def test_a_push_of_too_many_files_changes_nothing(machine, files, said):
    machine.lives(FILES)
    before, containers = machine.whole(), str(machine.containers)
    assert said in refusal(machine.push, dict(FILES_2, **files))
    assert machine.changed(before) == [] and str(machine.containers) == containers
    assert not [line for line in machine.done if line.startswith(('mkdir', 'docker b'))]

@each('path', '''/etc/init/blog.conf /etc/nginx/conf.d/blog.conf /etc/init.d/blog
      /lib/systemd/system/blog.service /etc/systemd/system/blog.service''')
def test_a_name_that_something_on_the_server_has_is_refused(machine, path):
    machine.write(path, 'not ours')
    assert path in refusal(lambda: machine.push(FILES_2, old=ZERO))
    assert machine.read(path) == 'not ours' and machine.images == machine.containers == {}

def test_an_image_that_dockhand_did_not_build_is_not_replaced(plain):
    plain.images['blog:latest'] = {'Id': 'theirs'}
    said = refusal(lambda: plain.push(FILES_2, old=ZERO))
    assert 'docker has blog:latest already, and not from' in said
    assert plain.images == {'blog:latest': {'Id': 'theirs'}}
    assert plain.app.numbers() == []

def test_a_container_of_that_name_that_is_not_ours_is_left_alone(plain):
    plain.lives(FILES)
    theirs = plain.containers['blog--2'] = plain.container('x', 'y')
    for ref in ('refs/heads/plan', MAIN):
        said = refusal(plain.push, FILES_2, ref)
        assert said.startswith('docker has blog--2 already, and not from')
        assert plain.containers.get('blog--2') is theirs
    changed = ('docker rm ', 'docker build', 'docker create')
    assert not [line for line in plain.done if line.startswith(changed)]

REFUSED = dict(FILES_2, **{'nginx-proxy.conf': 'bogus'})

def test_of_a_push_that_is_refused_before_the_build_docker_is_told_nothing(plain):
    plain.lives(FILES)
    refusal(plain.push, REFUSED)
    assert not [line for line in plain.done if line.startswith('docker')]
    assert plain.app.load(2).failed

def test_a_worker_goes_live_where_nginx_is_gone(plain):
    plain.lives(ONE_WORKER)
    ask = plain.host.ask

    def without_nginx(argv, **options):
        dh.refuse_if(argv[0] == 'nginx', 'nginx: No such file or directory')
        return ask(argv, **options)
    plain.host.ask = without_nginx
    plain.host.nginx.known_version = None           # a push is a process of its own
    plain.broken['nginx'] = 9
    plain.push(TWO_WORKER)
    assert plain.app.live().number == 2

@each('what', 'container image')
@each('how', 'refused unanswered')
def test_what_is_not_ours_is_not_removed_with_a_release_that_never_came(plain, what, how):
    plain.lives(FILES)
    if what == 'container':
        plain.containers['blog--2'] = plain.container('x', 'y')
    else:
        plain.images['blog:2'] = {'Id': 'theirs'}
    if how == 'unanswered':
        plain.broken['docker inspect'] = 1
    refusal(plain.push, FILES_2 if how == 'unanswered' else REFUSED)
    assert plain.app.numbers() == [1]
    dh.cmd_destroy(plain.app, force=True)
    assert 'blog--2' in plain.containers or 'blog:2' in plain.images

@table('path, name', '''
    /etc/nginx/conf.d/blog.conf => nginx-proxy.conf
    /etc/init/blog.conf         => upstart.conf''')
def test_a_file_edited_on_the_server_is_not_overwritten(tmpdir, capfd, path, name):
    machine = Machine(tmpdir, 'upstart')
    machine.lives(FILES)
    by_hand = machine.read(path) + '# mine\n'
    machine.write(path, by_hand)
    assert refusal(machine.push, FILES_2) == (
        'to keep that, commit it in %s and push; to drop it: sudo rm %s, and try again'
        % (name, path))
    assert machine.read(path) == by_hand and machine.running() == ['sha256:FROMone']
    assert '       +# mine\n' in capfd.readouterr().err

def test_what_is_live_already_is_accepted_at_once(plain):
    plain.lives(FILES)
    plain.push(FILES, new=SHA)
    plain.push({}, 'refs/tags/v1', ZERO)
    assert plain.done == []

def test_the_loser_of_two_pushes_is_refused_before_anything_is_built(plain):
    plain.lives(FILES)
    said = refusal(lambda: plain.push(FILES_2, old=SHA_3))
    assert re.match(r'another push went live: pull, then push again '
                    r'\(1111111111 is live since \d{4}-\d\d-\d\d \d\d:\d\d, by anna\)\Z',
                    said)
    assert plain.done == []

@pytest.mark.parametrize('ref, new', [
    ('refs/heads/feature', SHA), ('refs/heads/main', ZERO), ('refs/replace/' + SHA, SHA)])
def test_a_ref_that_is_refused_builds_nothing(plain, ref, new):
    plain.lives(FILES)
    assert refusal(lambda: plain.push(FILES_2, ref, SHA, new))
    assert plain.done == [] and plain.refs['refs/heads/main'] == SHA

def test_a_plan_says_what_would_change_and_changes_nothing(machine, capfd):
    machine.lives(FILES)
    before, files = machine.whole(), but('job', JOB.replace('--rm', '--rm -p ::1:81:80'))
    said = refusal(lambda: machine.push(files, 'refs/heads/plan', ZERO))
    assert said == ('this was a plan, nothing has changed; to deploy it: git push REMOTE '
                    'HEAD:main')
    assert machine.changed(before) == []
    assert not re.search('docker (create|s|tag)|\nstop', '\n'.join(machine.done))
    err = capfd.readouterr().err
    for line in ('--- live/upstart.conf', '+++ new/upstart.conf',
                 '-exec docker run --rm blog', '+exec docker run --rm -p ::1:81:80 blog',
                 '--- live/ports', '-none', '+::1:81:80', 'image: another',
                 'gap: one stop and one start of the service'):
        assert '       %s\n' % line in err
    assert re.search(r'\n       space: the image has 5\.0 MB, \d+ MB are free\n', err)

# What stands above each build of a docker 28 that has no buildx
ADVICE_OF_28 = '''\
DEPRECATED: The legacy builder is deprecated and will be removed in a future release.
            Install the buildx component to build images with BuildKit:
            https://docs.docker.com/go/buildx/

'''

def test_the_older_builders_advice_is_kept_from_the_pusher_and_no_other_line(
        plain, capfd):
    own = ['DEPRECATED: left-pad is not maintained', '            Install it again',
           'see https://docs.docker.com/go/buildx/']
    build = plain.docker_build

    def with_advice(*words):
        for line in ADVICE_OF_28.splitlines() + own:
            plain.each(line)
        return build(*words)
    plain.docker_build = with_advice
    plain.lives(ONE_WEB)
    plain.push(TWO_WEB)
    said = capfd.readouterr().err
    built = re.search(r'Building blog:2\n((?:       .*\n)*)', said).group(1)
    assert built.splitlines()[:4] == ['       ' + line for line in own] + [
        '       Step 1/1 : FROM two']

def test_the_size_of_an_image_is_that_of_all_its_layers_with_an_old_docker_too(
        plain, capfd):
    build = plain.docker_build

    def in_layers(*words):
        build(*words)
        plain.images['blog:2'].update(Size=1000, VirtualSize=7000000)
    plain.docker_build = in_layers
    plain.lives(ONE_WEB)
    plain.push(TWO_WEB)
    assert '       image: 7.0 MB\n' in capfd.readouterr().err

@pytest.mark.parametrize('files', [
    ONE_WEB, ONE_DATA, FILES, an_app('one', ''), an_app('one', 'EXPOSE 5432'),
    an_app('one', 'EXPOSE 8000', WEB.replace('root /x;', 'proxy_pass http://blog;'))])
def test_a_plan_of_what_is_live_says_that_nothing_changes(plain, files, capfd):
    plain.nginx()
    plain.push(files, old=ZERO, new=SHA)
    capfd.readouterr()
    refusal(plain.push, files, 'refs/heads/plan', ZERO)
    said = capfd.readouterr().err
    shown = said.partition('What a push of this would change:\n')[2].splitlines()
    names = [name for name in ('upstart.conf', 'nginx-proxy.conf') if name in files]
    if files in (ONE_WEB, ONE_DATA):
        names = ['nginx-proxy.conf']
    assert [line.strip() for line in shown[:-2]] == [
        name + ': no change' for name in names + ['ports', 'image']]
    assert shown[-2].startswith('       gap: ')

def test_a_push_without_the_proxy_file_removes_the_old_one(plain):
    live = plain.lives(FILES)
    for act in switch_steps(plain.host, live, live._replace(proxy=None), run=False):
        act()
    assert plain.read('/etc/nginx/conf.d/blog.conf') is None and plain.served == {}

def test_a_proxy_file_that_is_not_ours_is_not_removed(plain):
    plain.write('/etc/nginx/conf.d/blog.conf', WEB)
    plain.host.nginx.restore('blog', None)
    assert plain.read('/etc/nginx/conf.d/blog.conf') == WEB

@each('name', 'redis blog:old')
def test_a_job_that_runs_another_image_can_be_deployed(plain, name):
    plain.images[name] = image('FROM other')
    live, new = plain.lives(FILES), plain.release(2, SHA_2, but('job', JOB.replace(
        'blog', name)))
    for act in [lambda: dh.Containers(plain.app).prepare(new)] + \
            switch_steps(plain.host, live, new):
        act()
    assert plain.running() == ['sha256:FROMother']

def test_a_push_without_room_for_a_build_is_refused(plain):
    assert re.match(r'\d+ MB are free on /var/lib/docker, a build wants 99999999: ',
                    refusal(plain.host.docker.check_space, 99999999))
    plain.write('/etc/docker/daemon.json', '{"data-root": "/mnt/docker"}')
    dh.make_folder(plain.host.path('/mnt/docker'))
    assert 'on /mnt/docker' in refusal(plain.host.docker.check_space, 99999999)
    plain.host.docker.check_space(1)

def test_a_plan_of_a_plain_app_changes_nothing(plain, capfd):
    plain.lives(ONE_WEB)
    before, containers = plain.whole(), str(plain.containers)
    for more, gap in (('', 'none'),
                      ('VOLUME /data', 'one stop and one start of the service')):
        said = refusal(plain.push, an_app('two', 'EXPOSE 80\n' + more), 'refs/heads/plan',
                       ZERO)
        assert said.startswith('this was a plan, nothing has changed; to deploy it: ')
        assert plain.changed(before) == [] and str(plain.containers) == containers
        err = capfd.readouterr().err
        for line in ('-8000 on 10.86.0.3', '+80 on 10.86.0.3', 'gap: ' + gap,
                     'image: another', '-    server 10.86.0.3:8000;',
                     '+    server 10.86.0.3:80;'):
            assert '       %s\n' % line in err
        assert 'upstart.conf' not in err

def test_a_plan_is_built_where_a_push_would_be_and_nowhere_else(plain):
    plain.lives(ONE_WEB)
    plain.app.docker.check_space = lambda: dh.refuse_if(True, 'no space')
    assert refusal(plain.push, TWO_WEB, 'refs/heads/plan', ZERO) == 'no space'
    assert not [line for line in plain.done if line.startswith('docker build')]

def test_nothing_is_done_as_root_that_is_the_git_users(plain):
    """Where there is no such user any more."""
    plain.lives(ONE_WEB)
    del plain.done[:]
    plain.write('/etc/passwd', 'root:x:0:0::/root:/bin/sh\n')
    for act in (lambda: plain.push(TWO_WEB), lambda: plain.app.git('gc')):
        assert 'there is no user git' in refusal(act)
    assert [line for line in plain.done if line.startswith(('git', 'mkdir'))] == []

def test_an_app_comes_back_and_goes_though_the_git_user_is_no_more(plain, capfd):
    plain.lives(ONE_WEB)
    plain.write('/etc/passwd', 'root:x:0:0::/root:/bin/sh\n')
    plain.containers['blog--1']['State']['Running'] = False
    refusal(dh.cmd_recover, plain.host)
    assert plain.running() == ['sha256:FROMone']
    assert 'blog: there is no user git' in capfd.readouterr().err
    dh.cmd_destroy(plain.app, force=True)
    assert plain.containers == {} and plain.served == {} and 'blog:1' not in plain.images
    assert not os.path.exists(plain.app.folder())

def test_a_live_release_whose_record_was_not_finished_is_never_too_old(plain):
    pushed(plain, SHA_2)
    live = plain.app.live()
    plain.app.save_record(live._replace(seconds=None))
    dh.clean_up(plain.app, live)
    assert plain.app.live().number == 2 and 'blog:2' in plain.images

def test_a_plan_of_a_first_push_leaves_no_trace(plain, capfd):
    plain.nginx()
    plain.host.nginx.restore('blog', None)
    dh.make_folder(plain.host.path('/var/lib/dockhand/apps'))
    before = plain.whole()
    refusal(lambda: plain.push(ONE_WEB, 'refs/heads/plan', ZERO))
    assert plain.changed(before) == []
    assert '       -none\n       +8000 on 10.86.0.2\n' in capfd.readouterr().err

PUSHED = ('server {\n    server_name www.org;\n'
          '    location / { proxy_pass http://blog; }\n}\n')

def test_a_pushed_proxy_file_may_name_the_app_as_its_upstream(plain):
    plain.nginx()
    plain.push(an_app('one', 'EXPOSE 9000', PUSHED), old=ZERO, new=SHA)
    where = (UPSTREAM % '    keepalive_timeout 1s;\n').replace('8000', '9000')
    wanted = PROXY_HEADER + PUSHED + where
    assert wanted == plain.read('/etc/nginx/conf.d/blog.conf')
    assert plain.served == {'/etc/nginx/conf.d/blog.conf': wanted}
    assert plain.app.live().web
    plain.push(an_app('two', 'EXPOSE 9000', wanted))     # copied from the server
    assert plain.served == {'/etc/nginx/conf.d/blog.conf': wanted.replace('.0.2', '.0.3')}
    assert 'docker stop -t 10 blog--1' == plain.done[-1]

LEADS_TO = 'server { server_name a; location / { proxy_pass http://%s; } }'

@pytest.mark.parametrize('proxy, more, said', [
    ('\n\nserver { server_name a; broken; }', 'EXPOSE 80', 'nginx-proxy.conf:3: broken'),
    (LEADS_TO % 'bloc', 'EXPOSE 80', 'nginx-proxy.conf:1: proxy_pass http://bloc'),
    (LEADS_TO % 'blog', 'CMD x', 'proxy_pass http://blog'),     # it has no port
    ('upstream blog { }\n', 'EXPOSE 80', 'upstream blog'),
    ('server { server_name wiki.org; }', 'EXPOSE 80',
     'nginx-proxy.conf:1: server_name "wiki.org" is taken')])
def test_a_pushed_proxy_file_of_a_plain_app_that_will_not_do_is_refused(
        plain, proxy, more, said):
    plain.write('/etc/nginx/conf.d/wiki.conf', 'server { server_name wiki.org; }')
    plain.lives(ONE_WEB)
    before = plain.whole()
    assert said in refusal(plain.push, an_app('two', more, proxy))
    assert plain.changed(before) == []

def test_what_was_changed_by_hand_may_be_committed_and_pushed(plain):
    plain.lives(an_app('one', 'EXPOSE 9000', PUSHED))
    path, by_hand = '/etc/nginx/conf.d/blog.conf', PUSHED.replace('www', 'w3')
    plain.write(path, plain.read(path).replace('www', 'w3'))
    assert 'commit it in nginx-proxy.conf' in refusal(plain.push, TWO_WEB)
    assert 'commit it in nginx-proxy.conf' in refusal(dh.cmd_config, plain.app, 'A=1')
    assert 'w3' in plain.read(path)
    plain.push(an_app('two', 'EXPOSE 9000', by_hand))
    assert plain.read(path).startswith(PROXY_HEADER + by_hand)

@each('name', 'docker-compose.yml compose.yaml docker-compose.prod.yml')
def test_a_repository_with_only_a_compose_file_is_refused(plain, name):
    plain.lives(ONE_WEB)
    assert refusal(plain.push, {name: 'services:'}) == (
        'no Dockerfile in this commit: it says how to build the app; '
        'a compose file is not read, push each service by itself')
    assert not [line for line in plain.done if 'docker build' in line]

def test_a_plan_leaves_no_log_and_no_cache_that_a_test_of_nginx_made(plain):
    plain.lives(FILES)
    test = plain.nginx_t

    def tested(*words):             # as nginx makes what a configuration names
        plain.write('/var/log/nginx/blog.log', '')
        dh.make_folder(plain.host.path('/var/cache/nginx/blog'))
        return test(*words)
    plain.nginx_t = tested
    proxy = ('proxy_cache_path /var/cache/nginx/blog keys_zone=blog:1m;\n'
             + WEB.replace('listen', 'access_log /var/log/nginx/blog.log; listen'))
    assert 'this was a plan' in refusal(
        lambda: plain.push(but('proxy', proxy), 'refs/heads/plan', ZERO))
    assert plain.read('/var/log/nginx/blog.log') is None
    assert not os.path.exists(plain.host.path('/var/cache/nginx/blog'))

# ---- The release command ---------------------------------------------------------------

def test_a_release_command_runs_in_the_new_image_before_the_switch(plain, capfd):
    plain.lives(ONE_DATA, release="migrate --to 'a b'", A='1')
    plain.push(TWO_DATA)
    found, = [line for line in plain.done if line.startswith('docker run')]
    assert found == (
        'docker run --rm --name blog--2--release --net=dockhand --env-file='
        '/var/lib/dockhand/apps/blog/releases/2/env '
        '--add-host=host.docker.internal:10.86.0.1 --volume=blog--data:/data '
        '--pids-limit=4096 sha256:FROMtwo migrate --to a b')
    assert plain.ran == {'volumes': ['blog--data'], 'address': None,
                         'env': 'A=1\nGIT_REV=%s\nPORT=8000\n' % SHA_2,
                         'network': plain.networks['dockhand']['Id'],
                         'image': 'sha256:FROMtwo'}
    at = plain.done.index(found)
    assert not [line for line in plain.done[:at] if re.match('docker (st|cr|tag)', line)]
    err = capfd.readouterr().err
    assert ("-----> Running the release command: migrate --to 'a b'\n"
            '       migrated\n') in err

def test_a_release_command_that_fails_refuses_the_push(plain):
    plain.lives(ONE_WEB, release='migrate')
    before, containers = plain.whole(), str(plain.containers)
    plain.broken['docker run'] = 1
    assert refusal(plain.push, TWO_WEB) == (
        'the release command failed (1); nothing has changed')
    assert plain.changed(before) == [] and str(plain.containers) == containers
    assert 'docker rm -f -v blog--2--release' in plain.done

@pytest.mark.parametrize('files', [ONE_WEB, ONE_DATA, FILES])
def test_a_release_command_that_fails_refuses_the_config_it_came_with(plain, files):
    plain.lives(files, A='0')
    before = plain.whole()
    plain.broken['docker run'] = 1
    assert refusal(dh.cmd_config, plain.app, 'A=1', 'release=x') == (
        'the release command failed (1); nothing has changed')
    assert plain.changed(before) == []
    dh.cmd_config(plain.app, 'A=1', 'release=x')
    assert plain.app.config()['A'] == '1'

def test_a_release_command_of_a_job_app_gets_its_options_but_no_port(machine):
    job = ('env X=1\nchdir /srv\n'
           'exec docker run --rm -p 81:80 -v /srv/x:/x -e X blog serve\n')
    machine.lives(but('job', job), release='migrate')
    call, options = machine.host.ask, []
    machine.host.ask = lambda argv, **given: (
        options.append(given) if argv[1] == 'run' else None) or call(argv, **given)
    machine.push(dict(but('job', job), Dockerfile='FROM two'))
    found, = [line for line in machine.done if line.startswith('docker run')]
    known, given = '--volume=/srv/x:/x --env=X', ({'X': '1'}, '/srv')
    if machine.init == 'upstart':       # what its job would do with it only init knows
        known = '--env-file=/var/lib/dockhand/apps/blog/releases/2/env'
        given = ({}, '/')
    assert found == ('docker run --rm --name blog--2--release %s --pids-limit=4096 '
                     'sha256:FROMtwo migrate' % known)
    assert (options[0].get('env'), options[0].get('cwd')) == given

@table('option, kept', """
    --ipc=host                              => --ipc=host
    --publish=80:80                         =>
    --publish-all                           =>
    --ip=10.86.0.2                          =>
    --network-alias=blog                    =>
    --net=dockhand                          => --net=dockhand
    --network=name=dockhand,alias=blog      => --network=name=dockhand
    --network=alias=blog,name=dockhand,ip=1 => --network=name=dockhand""")
def test_a_release_command_takes_no_place_of_the_app(option, kept):
    assert dh.without_places(['--env=A=1', option]) == ['--env=A=1'] + [kept] * bool(kept)

# ---- A push ends as git will end it ----------------------------------------------------

# Git moves the branch once dockhand is done: what it would refuse is refused here.

@table('kind, said', '''
    tag => an annotated tag is no commit, which a branch wants: git push REMOTE v1.0^{}:%s
    tree => a tree is no commit, which a branch wants: git push REMOTE HEAD:%s
    blob => a blob is no commit, which a branch wants: git push REMOTE HEAD:%s''')
def test_what_is_no_commit_is_refused_before_anything(plain, kind, said):
    plain.lives(FILES)
    before = plain.whole()
    plain.kinds[SHA_2] = kind
    for ref in (MAIN, 'refs/heads/plan'):
        assert refusal(lambda: plain.push(FILES_2, ref)) == said % ref
    assert plain.changed(before) == [] and plain.done == []

def test_an_app_whose_live_commit_is_a_tag_takes_the_next_push(plain):
    live = plain.lives(FILES)
    plain.app.save_record(live._replace(commit=SHA_3))
    plain.commits[SHA_3], plain.kinds[SHA_3] = FILES, 'tag'
    plain.push(FILES_2)
    assert plain.app.live().commit == SHA_2

def test_the_next_push_after_a_killed_one_that_went_live_is_deployed(plain):
    """git was killed before it moved the branch: it stays where the pusher saw it, or git
    could not move it after this push."""
    plain.lives(FILES)
    plain.refs[MAIN] = SHA_3            # live is SHA
    plain.history.add((SHA, SHA_2))
    dh.deploy(plain.app, 'anna', MAIN, SHA_3,
              plain.commits.setdefault(SHA_2, FILES_2) and SHA_2)
    assert plain.app.live().commit == SHA_2
    assert plain.refs[MAIN] == SHA_3

def test_a_push_does_not_move_the_branch_when_it_finishes_what_was_killed(plain):
    """Or it would be refused for its own earlier push."""
    plain.lives(FILES)
    new = half_deployed(plain)
    plain.app.set_link('live', new)
    plain.history.add((SHA_2, SHA_3))
    plain.commits[SHA_3] = but('docker', 'FROM three')
    dh.deploy(plain.app, 'anna', MAIN, SHA, SHA_3)
    assert plain.app.live().commit == SHA_3 and plain.refs[MAIN] == SHA

def test_a_tag_with_a_text_without_end_is_told_by_its_head(tmpdir):
    git = Git(tmpdir)
    commit = git.commit(git.write(b'tree', b''))
    tag = git.write(b'tag', b'object %s\ntype commit\ntag v1.0\ntagger a <a> 1 +0000\n\n'
                    % dh.to_bytes(commit) + b'tag x\n' * 2 ** 22)
    with ending():
        assert refusal(dh.check_is_commit, git.app, dh.to_text(binascii.hexlify(tag)),
                       MAIN) == ('an annotated tag is no commit, which a branch wants: '
                                 'git push REMOTE v1.0^{}:' + MAIN)

@table('head, name', r"""
    tag v1.0        => v1.0
    tag v/1-x_y     => v/1-x_y
    tag $(id)       => TAG
    tag a b         => TAG
    tag x\n\ntag y  => x
    \ntag y         => TAG""")
def test_the_name_of_a_tag_is_shown_if_it_is_one(tmpdir, head, name):
    git = Git(tmpdir)
    text = 'object %s\ntype commit\n%s\n' % (git.commit(git.write(b'tree', b'')), head)
    tag = dh.to_text(binascii.hexlify(git.write(b'tag', dh.to_bytes(text))))
    assert 'git push REMOTE %s^{}:' % name in refusal(
        dh.check_is_commit, git.app, tag, MAIN)

def test_a_checkout_that_does_not_end_is_ended(tmpdir):
    """As where a pattern in .gitattributes may match a long name in too many ways."""
    git = Git(tmpdir)

    def ask(argv, account=None, **options):
        if 'checkout-index' in argv:
            argv = ['sh', '-c', 'echo $$ > pid; while :; do echo x; sleep 0.1; done']
        return dh.execute(argv, cwd=str(tmpdir), **options)
    git.app.host.ask = ask
    commit = git.commit(git.tree(git.write(b'blob', b'x'), b'100644', b'a'))
    with ending():
        assert refusal(dh.write_files, git.app, commit, '/x', 0.5) == (
            'git took more than 0 s to check this commit out: see the patterns in its '
            '.gitattributes')
    pid = tmpdir.join('pid').read().strip()
    assert not os.path.exists('/proc/' + pid)

def test_a_checkout_that_fails_is_told_with_gits_words(tmpdir):
    git = Git(tmpdir)
    blob = git.write(b'blob', b'x')
    commit = git.commit(git.tree(blob, b'100644', b'a'))
    folder = git.app.build_folder()
    dh.replace_file(folder, 'no folder')
    assert re.search('checkout-index failed .128.: fatal: ', refusal(
        dh.write_files, git.app, commit, folder))

# ---- Crontabs, deployed ----------------------------------------------------------------

# What cron reads of an app goes with its release: put in place, put back, rolled back.

CRON_D = '/etc/cron.d/dockhand-blog'

def cron_in_force(machine):
    """What cron would run: [(when, the release that is live, command)]."""
    found = []
    for line in (machine.read(CRON_D) or '').splitlines()[4:]:
        when, script, id_ = re.match(r'(.*) root /bin/sh (\S+) (\w+)\Z', line).groups()
        text = machine.read(script)
        case = re.search(r'\n%s\) dockhand_line=\d+; set -- (.*) ;;' % id_, text)
        name = re.search('\ndockhand_name=(.*)--cron-', text).group(1)
        found.append((when, name, case and case.group(1)))
    return found

def both(number, name):
    return [('* * * * *', 'blog--%d' % number, 'bin/both'),
            ('@daily', 'blog--%d' % number, 'bin/' + name)]

def test_a_crontab_is_installed_rolled_back_and_removed_with_its_release(plain):
    plain.lives(an_app('zero'))
    plain.push(TWO_CRON)
    assert cron_in_force(plain) == both(2, 'two')
    path = plain.host.path('/var/lib/dockhand/apps/blog/releases/2/cron')
    assert mode_in(os.stat(path)) == '600'
    assert mode_in(os.stat(plain.host.path(CRON_D))) == '644'
    plain.push(ONE_CRON, old=SHA_2, new=SHA_3)
    assert cron_in_force(plain) == both(3, 'one')
    dh.cmd_config(plain.app, 'A=1')
    assert cron_in_force(plain) == both(4, 'one')
    dh.cmd_rebuild(plain.app)
    assert cron_in_force(plain) == both(5, 'one')
    dh.cmd_rollback(plain.app, '2')
    assert cron_in_force(plain) == both(2, 'two')
    assert plain.app.live().crontab == TWO_CRON['crontab']
    dh.cmd_rollback(plain.app, '1')
    assert plain.read(CRON_D) is None
    dh.cmd_rollback(plain.app, '2')
    dh.cmd_destroy(plain.app, True)
    assert plain.read(CRON_D) is None

def test_what_cron_runs_is_a_container_beside_the_app_as_that_is_described(plain):
    plain.lives(ONE_CRON, A='1')
    plain.push(dict(an_app('two', 'EXPOSE 8000\nVOLUME /data'), crontab='@daily x "y"\n'))
    text = plain.read('/var/lib/dockhand/apps/blog/live/cron')
    assert re.search('docker run .*', text).group() == (
        'docker run --rm --name "$dockhand_name" --net=dockhand '
        '--env-file=/var/lib/dockhand/apps/blog/releases/2/env '
        '--add-host=host.docker.internal:10.86.0.1 --volume=blog--data:/data '
        '--label=dockhand.app=blog --init --log-driver=none --pids-limit=4096 '
        'sha256:FROMtwo "$@" 2>&1 3>&- || dockhand_status=$?')
    assert "; set -- sh -c 'exec x \"y\"' ;;\n" in text

@pytest.mark.parametrize('files', [
    but('docker', 'FROM dies'), an_app('mute'),
    dict(ONE_CRON, Dockerfile='FROM mute\nEXPOSE 8000'),
    dict(TWO_CRON, Dockerfile='FROM dies\nEXPOSE 8000'),
    dict(TWO_CRON, Dockerfile='RUN fail')])
@pytest.mark.parametrize('before', [ONE_WEB, ONE_CRON])
def test_a_release_that_fails_leaves_the_crontab_as_it_was(plain, before, files):
    plain.lives(before)
    was, ran = plain.whole(), cron_in_force(plain)
    refusal(plain.push, files)
    assert plain.changed(was) == [] and cron_in_force(plain) == ran
    assert plain.read('/var/lib/dockhand/apps/blog/releases/2/cron') is None

@pytest.mark.parametrize('more', ['EXPOSE 8000', 'EXPOSE 8000\nVOLUME /data'])
@pytest.mark.parametrize('before', [ONE_CRON, ONE_WEB, None])
def test_a_switch_that_fails_at_its_last_step_puts_the_crontab_back(plain, before, more):
    plain.nginx()
    if before:
        plain.lives(dict(before, Dockerfile=an_app('one', more)['Dockerfile']))
    ran, reload, held = cron_in_force(plain), plain.nginx_s, []

    def nginx_s(*words):
        """The link `live` cannot be moved any more."""
        if not held:
            held.append(dh.make_folder(dh.temporary_of(plain.app.folder('live'))))
        return reload(*words)
    plain.nginx_s = nginx_s
    files = dict(an_app('two', more), crontab=TWO_CRON['crontab'])
    with pytest.raises(EnvironmentError):
        plain.push(files, MAIN, SHA if before else ZERO)
    assert held and cron_in_force(plain) == ran

def test_a_first_push_that_fails_leaves_no_crontab(plain):
    plain.nginx()
    refusal(plain.push, dict(ONE_CRON, Dockerfile='FROM dies\nEXPOSE 80'), MAIN, ZERO)
    assert plain.read(CRON_D) is None and plain.app.live() is None

def test_a_push_says_when_its_lines_will_run(plain, capfd):
    os.symlink('/usr/share/zoneinfo/Europe/Vienna', plain.host.path('/etc/localtime'))
    plain.lives(ONE_WEB)
    plain.push(TWO_CRON)
    assert '-----> crontab: 2 lines, by the clock of this server (Europe/Vienna)\n' in (
        capfd.readouterr().err)
    plain.push(dict(TWO_CRON, crontab='@daily x\n'), old=SHA_2, new=SHA_3)
    assert 'crontab: 1 line, by the clock' in capfd.readouterr().err
    os.unlink(plain.host.path('/run/crond.pid'))
    dh.cmd_rebuild(plain.app)
    err = capfd.readouterr().err
    assert '-----> Warning: cron does not run here: service cron start\n' in err

@pytest.mark.parametrize('link, name, zone', [
    ('/usr/share/zoneinfo/Etc/UTC', 'Europe/Vienna\n', 'Etc/UTC'),     # cron reads the link
    ('../usr/share/zoneinfo/America/New_York', None, 'America/New_York'),
    (None, 'Europe/Vienna\n', 'UTC'), (None, None, 'UTC')])
def test_the_clock_is_named_as_cron_reads_it(plain, link, name, zone):
    if link:
        os.symlink(link, plain.host.path('/etc/localtime'))
    if name:
        plain.write('/etc/timezone', name)
    assert dh.zone_of(plain.host) == zone

def test_a_clock_that_was_copied_has_the_name_that_stands_beside_it(plain):
    plain.write('/etc/localtime', 'TZif2')
    plain.write('/etc/timezone', 'Europe/Vienna\n')
    assert dh.zone_of(plain.host) == 'Europe/Vienna'

@pytest.mark.parametrize('files, said', [
    (dict(TWO_CRON, crontab='# x\n@daily x\n61 * * * * x\n'), 'crontab:3: minute `61`'),
    (dict(TWO_CRON, crontab=' \n'), 'crontab is empty'),
    (dict(TWO_CRON, crontab='@daily \0'), 'crontab holds a NUL byte'),
    (dict(TWO_CRON, crontab=dh.to_text(b'\xef\xbb\xbf@daily x\n')),
     'crontab:1: begins with a byte order mark'),
    (dict(FILES_2, crontab='@daily x\n'), 'crontab: it cannot stand beside upstart.conf')])
def test_a_crontab_that_will_not_do_is_refused_before_a_build(machine, files, said):
    machine.lives(FILES)
    before = machine.whole()
    assert said in refusal(machine.push, files)
    assert machine.changed(before) == []
    assert not [line for line in machine.done if line.startswith('docker build')]

@table('path, said', '''
    /usr/sbin/cron  => crontab: cron is missing here: apt-get install cron
    /usr/bin/flock  => crontab: flock is missing here: apt-get install util-linux
    /usr/bin/logger => crontab: logger is missing here: apt-get install bsdutils''')
def test_a_crontab_is_refused_where_nothing_would_run_it(plain, path, said):
    plain.lives(ONE_WEB)
    os.unlink(plain.host.path(path))
    before = plain.whole()
    assert refusal(plain.push, TWO_CRON) == said
    assert plain.changed(before) == []
    plain.push(TWO_WEB)                         # what has none wants none of them

def test_a_crontab_with_comments_alone_is_none(plain):
    plain.lives(ONE_WEB)
    os.unlink(plain.host.path('/usr/sbin/cron'))
    plain.push(dict(TWO_WEB, crontab='# @daily x\n'))
    assert plain.read(CRON_D) is None and plain.app.live().crontab == ''

def test_what_cron_reads_and_was_changed_by_hand_is_not_overwritten(plain, capfd):
    plain.lives(ONE_CRON)
    by_hand = plain.read(CRON_D).replace('@daily', '@hourly')
    plain.write(CRON_D, by_hand)
    said = 'to keep that, commit it in crontab; then, or to drop it: sudo rm ' + CRON_D
    assert said in refusal(plain.push, TWO_CRON)
    assert '-@daily root' in capfd.readouterr().err
    assert said in refusal(plain.push, TWO_WEB)
    assert said in refusal(dh.cmd_config, plain.app, 'A=1')
    dh.cmd_recover(plain.host)
    assert plain.read(CRON_D) == by_hand
    os.unlink(plain.host.path(CRON_D))
    plain.push(TWO_CRON)
    assert cron_in_force(plain) == both(plain.app.live().number, 'two')

@pytest.mark.parametrize('live', [ONE_WEB, None])
def test_a_file_of_crons_that_dockhand_did_not_write_is_left_alone(plain, live):
    plain.nginx()
    if live:
        plain.lives(live)
    plain.write(CRON_D, '* * * * * root somebody-elses\n')
    old = SHA if live else ZERO
    assert CRON_D + ' is on this server already' in refusal(
        plain.push, TWO_CRON, MAIN, old)
    plain.push(TWO_WEB, MAIN, old)
    dh.cmd_destroy(plain.app, True)
    assert plain.read(CRON_D) == '* * * * * root somebody-elses\n'

@pytest.mark.parametrize('path', [CRON_D, '/var/lib/dockhand/apps/blog/releases/1/cron'])
def test_recover_and_doctor_know_what_is_gone_of_a_crontab(plain, path):
    plain.lives(ONE_CRON)
    os.unlink(plain.host.path(path))
    assert dh.app_problem(plain.app) == (
        'the crontab of blog is not in place', 'sudo dockhand recover')
    dh.cmd_recover(plain.host)
    assert cron_in_force(plain) == both(1, 'one')
    assert not dh.app_problem(plain.app)[0]

@pytest.mark.parametrize('harm, said, remedy', [
    (lambda m: os.unlink(m.host.path('/usr/sbin/cron')),
     'the crontab of blog does not run: cron is missing', 'apt-get install cron'),
    (lambda m: os.unlink(m.host.path('/run/crond.pid')),
     'the crontab of blog does not run: cron is stopped', 'service cron start'),
    (lambda m: shutil.rmtree(m.host.path('/proc/70')),
     'the crontab of blog does not run: cron is stopped', 'service cron start'),
    (lambda m: m.write(CRON_D, m.read(CRON_D) + '#\n'),
     CRON_D + ' was changed on the server', 'sudo rm ' + CRON_D)])
def test_doctor_says_why_a_crontab_does_not_run(plain, harm, said, remedy):
    plain.lives(ONE_CRON)
    assert not dh.app_problem(plain.app)[0]
    harm(plain)
    problem, command = dh.app_problem(plain.app)
    assert problem.startswith(said) and remedy in command

def test_an_app_without_a_crontab_asks_for_no_cron(plain):
    plain.lives(ONE_WEB)
    os.unlink(plain.host.path('/usr/sbin/cron'))
    assert not dh.app_problem(plain.app)[0]

def test_a_line_that_runs_ends_with_its_release_and_not_before(plain):
    """A stop, a deploy and a rollback let it end by itself."""
    plain.lives(ONE_CRON)
    id_ = dh.cron_id(dh.cron_lines(plain.app.live())[0])
    plain.containers['blog--1--cron-' + id_] = dict(
        plain.container('c9', 'sha256:FROMone'), Name='/blog--1--cron-' + id_)
    dh.cmd_stop(plain.app)
    plain.push(TWO_CRON)
    dh.cmd_rollback(plain.app)
    assert 'blog--1--cron-' + id_ in plain.containers
    dh.cmd_destroy(plain.app, True)
    assert plain.containers == {}

def test_a_plan_shows_what_would_change_of_a_crontab(plain, capfd):
    plain.lives(ONE_CRON)
    refusal(plain.push, TWO_CRON, 'refs/heads/plan', ZERO)
    err = capfd.readouterr().err
    assert '-@daily bin/one\n' in err and '+@daily bin/two\n' in err
    assert cron_in_force(plain) == both(1, 'one')

@pytest.mark.parametrize('path', [CRON_D, '/var/lib/dockhand/apps/blog/releases/1/cron'])
def test_what_a_kill_leaves_beside_a_crontab_is_swept(plain, path):
    plain.lives(ONE_CRON)
    left = dh.temporary_of(path)
    assert '.' in os.path.basename(left)        # cron skips it meanwhile
    plain.write(left, 'half')
    dh.cmd_recover(plain.host)
    assert plain.read(left) is None

# ---- Keeping ---------------------------------------------------------------------------

# Which releases stay, and what goes of the others.

def test_five_releases_are_kept_and_what_goes_is_told(machine, capfd):
    pushed(machine, *[number * 40 for number in '234567'])
    machine.app.set_link('live', machine.app.load(3))
    capfd.readouterr()
    dh.after_push(machine.app, None)
    assert [each.number for each in machine.app.kept()] == [
        3, 7, 6, 5, 4]
    assert sorted(machine.images) == ['blog:%d' % number for number in range(3, 8)] + [
        'blog:latest']
    assert sorted(ref for ref in machine.refs if 'dockhand' in ref) == [
        'refs/dockhand/%d' % number for number in range(3, 8)]
    assert machine.init == 'upstart' or sorted(machine.containers) == [
        'blog--%d' % number for number in range(3, 8)]
    err = capfd.readouterr().err
    assert re.search(r'-----> Release 1 is removed, \d+\.\d MB freed\n', err)
    assert 'with what it wrote outside volumes: /srv/kept.db\n' in err

@table('text, left', """
    RUN fail  => docker rmi 0123456789ab
    FROM dies => docker rmi bbbbbbbbbbbb 0123456789ab""")
def test_what_a_push_that_failed_left_goes_with_the_next_clean_up(plain, text, left):
    """Its image has gone by then, but not what that stood on."""
    pushed(plain, SHA_2)
    build = plain.docker_build
    plain.images['<none>'] = {'Id': '0123456789ab'}
    plain.images['<none> too'] = {'Id': 'b' * 12}

    def building(*words):
        plain.each(' ---> 0123456789ab')
        result = build(*words)
        if 'blog:3' in plain.images:
            plain.images['blog:3']['Parent'] = 'sha256:' + 'b' * 64
        return result
    plain.docker_build = building
    assert refusal(plain.push, but('docker', text), MAIN, SHA_2, SHA_3)
    for _ in range(2):
        dh.after_push(plain.app, None)
    assert [line for line in plain.done if re.match('docker rmi [0-9a-f]{12}', line)] == [left]
    assert [each.number for each in plain.app.kept()] == [2, 1]

def test_a_failed_build_takes_no_image_along_that_has_a_name(plain):
    pushed(plain, SHA_2)
    build = plain.docker_build
    plain.docker_build = lambda *words: plain.each(' ---> 0123456789ab') or build(*words)
    plain.images['base:1'] = {'Id': '0123456789ab', 'RepoTags': ['base:1']}
    assert refusal(plain.push, but('docker', 'RUN fail'), MAIN, SHA_2, SHA_3)
    dh.after_push(plain.app, None)
    assert 'docker rmi 0123456789ab' not in plain.done

def test_what_was_live_last_is_kept_and_what_a_rollback_goes_to(plain):
    pushed(plain, *[number * 40 for number in '23456'])
    dh.cmd_rollback(plain.app, '2')
    plain.push(but('docker', 'FROM 7'), MAIN, '2' * 40, '7' * 40)
    dh.after_push(plain.app, None)
    assert [each.number for each in plain.app.kept()] == [
        7, 2, 6, 5, 4]
    assert dh.earlier_release(plain.app, plain.app.live(), None)[0].number == 2

@table('images, kept', '''
    ABCDEFG   => ABCDE
    AAAAAAB   => AA....B
    ABABABC   => ABAB..C
    ABCDEFA   => ABCDE.A
    AAABBBCCC => AA.BB.CC.
    A         => A''')
def test_releases_of_the_last_five_images_are_kept_and_two_of_one(images, kept):
    releases = [release(number=number, image=image)
                for number, image in enumerate(images)]
    assert [each.number for each in dh.worth_keeping(releases)] == [
        number for number, letter in enumerate(kept) if letter != '.']

def test_changes_of_config_leave_the_way_back_to_an_earlier_commit(plain, capfd):
    pushed(plain, SHA_2, SHA_3)
    for number in range(7):
        dh.cmd_config(plain.app, 'A=%d' % number)
    assert [each.commit for each in plain.app.kept()] == [SHA_3, SHA_3, SHA_2, SHA]
    capfd.readouterr()
    dh.cmd_releases(plain.app)
    assert re.search(r'(?m)^  10 .* root +\d\.\d s  live \(config A\)$',
                     capfd.readouterr().out)
    dh.cmd_rollback(plain.app, '1')
    assert plain.app.live().commit == SHA

STAGES = '''Step 1/12 : FROM scratch AS tools
 --->
Step 2/12 : COPY busybox /bin/
 ---> aaaaaaaaaa01
Step 3/12 : FROM tools AS build
 ---> aaaaaaaaaa01
Step 4/12 : COPY v /src/v
 ---> Using cache
 ---> aaaaaaaaaa02
Step 5/12 : RUN make
 ---> Running in cccccccccccc
Removing intermediate container cccccccccccc
 ---> aaaaaaaaaa03
Step 6/12 : from debian
 ---> bbbbbbbbbbbb
Step 7/12 : FROM scratch
 --->
Step 8/12 : COPY --from=build /v /v
 ---> aaaaaaaaaa04'''

def test_the_last_layer_of_each_stage_is_known_and_what_it_starts_from_is_not_ours():
    reader = dh.StageReader()
    for line in STAGES.split('\n'):
        reader.hear(line)
    assert reader.layers == ['aaaaaaaaaa01', 'aaaaaaaaaa03', 'aaaaaaaaaa04']

DISK_USAGE = '''ID:\t\tv4r0royvsy1tm9v8k7yqed7ou
Created at:\t2026-11-28 21:44:48.85805167 +0000 UTC
Mutable:\ttrue
Size:\t\t1.982MB
Description:\tlocal source for context
Usage count:\t%d
Last used:\t6 seconds ago
Type:\t\tsource.local

ID:\t\tjc3slvb44689epfy346e164tw
Parent:\t\tv4r0royvsy1tm9v8k7yqed7ou
Usage count:\t1
Type:\t\tregular
%s
Shared:\t\t1.982MB
Total:\t\t4.374MB
'''

def test_what_buildx_keeps_is_read_with_how_often_it_was_used():
    assert dh.read_build_cache(DISK_USAGE % (2, '')) == {
        'v4r0royvsy1tm9v8k7yqed7ou': 2, 'jc3slvb44689epfy346e164tw': 1}
    assert dh.read_build_cache('') == {}

class Builder(Machine):
    """A Machine whose builds leave a layer each for the stages of the Dockerfile: `KEPT x`
    is one that does not change."""
    def docker_build(self, *words):
        result = Machine.docker_build(self, *words)
        text = dh.read_file(os.path.join(words[-1], 'Dockerfile'))
        for stage in re.findall('STAGE (\\w+)', text):
            self.images['<none>' + stage] = {'Id': stage}
            for line in ('Step 1 : FROM x', ' ---> dddddddddddd', ' ---> ' + stage):
                self.each(line)
        return result

    def stages(self):
        return sorted(name[6:] for name in self.images if name.startswith('<none>'))

def staged(name, *stages):
    return an_app(name, 'EXPOSE 8000\n' + ' '.join('STAGE ' + stage for stage in stages))

SAME, OTHER, OTHER_2, OTHER_3, OTHER_4 = [digit * 12 for digit in 'abcde']

def test_the_stages_of_earlier_builds_go_and_those_of_the_live_one_stay(tmpdir):
    machine = Builder(tmpdir)
    machine.nginx()
    machine.push(staged('one', SAME, OTHER), old=ZERO, new=SHA)
    dh.after_push(machine.app, None)
    assert machine.stages() == [SAME, OTHER]
    machine.push(staged('two', SAME, OTHER_2))
    dh.after_push(machine.app, None)
    assert machine.stages() == [SAME, OTHER_2]
    dh.cmd_config(machine.app, 'A=1')                   # which builds nothing
    assert machine.stages() == [SAME, OTHER_2]
    assert refusal(machine.push, staged('fail', SAME, OTHER_3), MAIN, SHA_2, SHA_3)
    assert machine.stages() == [SAME, OTHER_2, OTHER_3]  # the mended one begins there
    machine.push(staged('three', SAME, OTHER_4), MAIN, SHA_2, '4' * 40)
    dh.after_push(machine.app, None)
    assert machine.stages() == [SAME, OTHER_4]
    assert refusal(machine.push, staged('plan', SAME, OTHER_3), 'refs/heads/plan', ZERO,
                   '5' * 40)
    assert machine.stages() == [SAME, OTHER_4]
    dh.cmd_destroy(machine.app, force=True)
    assert machine.stages() == []

def test_a_stage_that_another_app_has_too_stays(tmpdir):
    machine = Builder(tmpdir)
    machine.nginx()
    machine.push(staged('one', SAME), old=ZERO, new=SHA)
    other = dh.App(machine.host, 'wiki')
    other.save(release(app='wiki', number=1, layers=[SAME], seconds=1))
    other.set_link('live', release(number=1))
    machine.push(staged('two', OTHER))
    dh.after_push(machine.app, None)
    assert machine.stages() == [SAME, OTHER]

def test_what_buildx_made_for_earlier_builds_goes_by_id(tmpdir, monkeypatch):
    machine = Machine(tmpdir)
    machine.write('/usr/libexec/docker/cli-plugins/docker-buildx', '')
    known = {}

    def buildx(*words):
        assert words == ('buildx', 'du', '--verbose')
        return '\n\n'.join('ID: %s\nUsage count: %d' % each for each in known.items())
    machine.docker_buildx = buildx
    machine.docker_builder = lambda *words: None
    same, first, second, foreign = [letter * 25 for letter in 'abcd']
    known[foreign] = 1
    build = machine.docker_build

    def building(*words):
        known[same] = known.get(same, 0) + 1
        known[second if first in known else first] = 1
        return build(*words)
    machine.docker_build = building
    machine.nginx()
    machine.push(an_app('one'), old=ZERO, new=SHA)
    machine.push(an_app('two'))
    dh.after_push(machine.app, None)
    assert [line for line in machine.done if 'builder' in line] == [
        'docker builder prune -f --filter id=/(%s)/' % first]
    assert sorted(machine.app.live().layers) == [same, second]

@pytest.mark.parametrize('mounted, diff, written', [
    (['/data'], 'A /data', []), (['/var/lib/x'], 'A /var\nA /var/lib\nA /var/lib/x', []),
    (['/data'], 'A /data\nA /data2', ['/data2']),
    ([], 'C /usr\nC /usr/sbin\nA /usr/sbin/docker-init', []),
    ([], 'C /sbin\nA /sbin/docker-init\nA /.dockerenv\nA /run/x\nC /tmp', []),
    ([], 'C /app\nC /app/__pycache__\nA /app/__pycache__/a.pyc', []),
    ([], 'C /etc\nA /etc/hosts\nA /etc/resolv.conf\nC /root\nC /root/.cache/x', []),
    ([], 'C /etc\nC /etc/passwd\nC /srv\nA /srv/kept.db', ['/etc/passwd', '/srv/kept.db'])])
def test_only_what_somebody_may_miss_is_told_of_a_container_that_goes(
        plain, mounted, diff, written):
    plain.docker_diff = lambda _, name: diff
    plain.containers['x'] = {'Id': 'x', 'Mounts': [{'Destination': path}
                                                   for path in mounted]}
    assert plain.host.docker.written_files('x') == written

def test_a_release_whose_image_a_container_uses_stays(plain, capfd):
    pushed(plain, *[number * 40 for number in '23456'])
    plain.docker_rmi = lambda *words: Result(1, '', 'conflict: container x is using it\n')
    dh.after_push(plain.app, None)
    assert 'Release 1 stays: a container uses its image\n' in capfd.readouterr().err
    assert plain.app.numbers() == [1, 2, 3, 4, 5, 6]
    assert plain.refs['refs/dockhand/1'] == SHA

# ---- What the pusher is told -----------------------------------------------------------

def test_doubts_are_told_by_the_line_of_the_repository(plain, capfd):
    plain.lives(FILES)
    files = but('docker', 'FROM dies VOLUME')
    files['upstart.conf'] = 'start on x\nexec docker run -rm -p 8000:80 blog\n'
    refusal(plain.push, files)
    err = capfd.readouterr().err
    assert '-----> Written with two dashes, for docker of today: -rm\n' in err
    assert '-----> upstart.conf:2: ' + OPEN % ('8000:80', '127.0.0.1:8000:80') in err
    assert '-----> upstart.conf:2: ' + GOES % ('/data', '/srv/blog/data:/data') in err

def test_a_note_about_upstart_is_for_those_who_have_it(machine, capfd):
    machine.lives(FILES)
    job = JOB.replace('started', 'filesystem and started')
    refusal(machine.push, dict(but('docker', 'FROM dies'), **{'upstart.conf': job}))
    found = '-----> upstart.conf:1: ' + NOTE in capfd.readouterr().err
    assert found == (machine.init == 'upstart')

def test_what_is_not_part_of_a_push_is_noted(plain, capfd):
    plain.lives(FILES)
    refusal(plain.push, dict(but('docker', 'FROM dies'), **{
        '.gitmodules': 'x', '.gitattributes': '*.x filter=lfs'}))
    err = capfd.readouterr().err
    assert 'Note: submodules' in err and 'Note: files kept by git LFS' in err

@table('name, said', '''
    here.org => -----> blog: http://here.org:{0}/ answers 418
    there.org => -----> blog answers 418: curl -H 'Host: there.org' http://HOST:{0}/
    there.org => there.org leads to 192.0.2.7: point it here in DNS
    nowhere.org => nowhere.org leads nowhere yet: point it here in DNS''')
def test_a_push_ends_with_an_address_that_was_fetched(plain, capfd, name, said):
    listener = socket.socket()
    listener.bind(('127.0.0.1', 0))
    listener.listen(1)
    port, heard = listener.getsockname()[1], []

    def answer():
        connection = listener.accept()[0]
        heard.append(connection.recv(999))
        connection.sendall(b'HTTP/1.1 418 No\r\n\r\n')
        connection.close()
    thread = threading.Thread(target=answer)
    thread.start()
    plain.lives(but('proxy', 'server { listen %d; server_name %s; }' % (port, name)))
    dh.after_push(plain.app, None)
    thread.join()
    listener.close()
    assert said.format(port) in capfd.readouterr().err
    assert heard == [dh.to_bytes('GET / HTTP/1.1\r\nHost: %s\r\nUser-Agent: dockhand\r\n'
                                 'Connection: close\r\n\r\n' % name)]
    assert plain.head == 'refs/heads/main'
    assert dh.fetch_status(Host(), name, port).startswith('nothing (')

@table('client, server, told', '''
    198.51.100.7 => 203.0.113.7 => blog: http://blog.203-0-113-7.sslip.io/ answers 200
    198.51.100.7 => 203.0.113.8 => blog answers 200: curl -H 'Host: blog' http://203.0.113.8/
    198.51.100.7 => 10.0.0.5    => blog answers 200: curl -H 'Host: blog' http://HOST/
    10.0.0.9     => 10.0.0.5    => blog answers 200: curl -H 'Host: blog' http://10.0.0.5/
    2001:db8::9  => 2001:db8::1 => blog: http://blog.2001-db8--1.sslip.io/ answers 200
    fd00::9      => fd00::1     => blog answers 200: curl -H 'Host: blog' http://[fd00::1]/
    x            => 203.0.113.7 => blog answers 200: curl -H 'Host: blog' http://HOST/''')
def test_a_link_leads_to_the_address_that_the_pusher_came_to(
        plain, capfd, client, server, told):
    plain.lives(ONE_WEB)
    plain.here = server
    dh.receive(plain.host, 'post-receive', 'blog', 'anna',
               '%s 50000 %s 22' % (client, server))
    err = capfd.readouterr().err
    assert '-----> %s\n' % told in err
    assert '172.17' not in err

@table('text', '''
    \\_
    198.51.100.7 1 203.0.113.7
    198.51.100.7 1 203.0.113.7 22 x
    198.51.100.7 1 203.0.113.7; 22
    198.51.100.7 1 $(id) 22
    198.51.100.7 1 203.0.113 22
    198.51.100.7 1 fe80::1%eth0 22''')
def test_what_is_no_ssh_connection_is_none(text):
    assert dh.parse_connection(text.strip()) is None
    assert dh.parse_connection('198.51.100.7 1 203.0.113.7 22') == (
        '198.51.100.7', '203.0.113.7')

@each('address', '''10.1.2.3 127.0.0.1 169.254.1.1 172.16.0.1 172.31.255.255 192.168.0.1
    100.64.0.1 100.127.0.1 ::1 fe80::1 febf::1 fc00::1 fdff::1''')
def test_only_neighbours_reach_a_private_address(address):
    assert dh.is_private(address)

@each('address', '''11.1.2.3 128.0.0.1 169.253.1.1 172.15.0.1 172.32.0.1 192.167.0.1
    100.63.0.1 100.128.0.1 2001:db8::1 fec0::1 fb00::1 ::''')
def test_the_world_reaches_any_other(address):
    assert not dh.is_private(address)

@pytest.mark.parametrize('answer, proxy, is_wrong', [
    ('200 OK\r\nX-Dockhand: abcd1234', '', False),
    ('404 No\r\nx-dockhand:abcd1234', '', False),
    ('301 Moved\r\nLocation: https://there.org/', '', False),
    ('404 No\r\nX-Dockhand: ffff0000', '', True), ('200 OK', '', True),
    ('200 OK\r\nX-Dockhand: ffff0000\r\nX-Dockhand: abcd1234', '', False),
    ('200 OK', 'add_header X-A b;', False), ('', 'add_header X-A b;', True)])
def test_a_name_that_leads_elsewhere_is_wrong_only_where_it_does_not_come_back(
        plain, capfd, answer, proxy, is_wrong):
    """By way of a cache, or of a router that this server is behind."""
    plain.write(dh.TOKEN_FILE, 'abcd1234\n')
    plain.lives(but('proxy', 'server { listen 80; server_name there.org; %s }' % proxy))
    asked = []

    def connect(place, timeout, tls_name=None):
        connection = Machine.connect(plain, ('127.0.0.1', 80), timeout)
        if place == ('192.0.2.7', 80):
            connection = Heard(asked, 'HTTP/1.1 %s\r\n\r\n' % answer if answer else '')
        return connection
    plain.host.connect = connect
    dh.after_push(plain.app, None)
    err = capfd.readouterr().err
    assert ('there.org leads to 192.0.2.7' in err) == is_wrong
    assert ('blog: http://there.org/ answers 200' in err) != is_wrong
    assert asked[0].startswith('GET /.well-known/dockhand HTTP/1.1\r\nHost: there.org\r\n')

@table('own, is_wrong', '''
    192.168.1.5 172.18.0.1 => no
    192.0.2.9 172.18.0.1   => yes''')
def test_a_router_that_leads_nowhere_from_within_is_no_fault(plain, capfd, own, is_wrong):
    plain.lives(but('proxy', 'server { listen 80; server_name there.org; }'))
    plain.hostname = lambda option: own + ' \n'
    dh.after_push(plain.app, None)
    told = 'there.org leads to 192.0.2.7' in capfd.readouterr().err
    assert told == (is_wrong == 'yes')

def test_the_connection_of_whoever_typed_sudo_is_found_above_it(plain):
    said = 'SSH_CONNECTION=198.51.100.7 1 203.0.113.7 22'
    plain.write('/proc/%d/stat' % os.getpid(), '%d (python) S 77 1' % os.getpid())
    plain.write('/proc/%d/environ' % os.getpid(), 'HOME=/root\0')
    plain.write('/proc/77/stat', '77 (sudo) S 1 1')
    plain.write('/proc/77/environ', 'A=b\0%s\0' % said)
    assert dh.own_connection(plain.host) == ('198.51.100.7', '203.0.113.7')
    plain.write('/proc/77/environ', 'A=b\0')
    assert dh.own_connection(plain.host) is None

class Heard(object):
    """A connection that notes what it is asked, and gives one answer."""
    def __init__(self, asked, answer):
        self.asked, self.answer = asked, dh.to_bytes(answer)

    def settimeout(self, seconds):
        pass

    def sendall(self, data):
        self.asked.append(dh.to_text(data))

    def recv(self, size):
        return self.answer

    def close(self):
        pass

def test_a_token_is_made_once(plain):
    dh.cmd_install(plain.host)
    token = plain.read(dh.TOKEN_FILE)
    assert re.match(r'[0-9a-f]{16}\n\Z', token)
    assert token.strip() in plain.read('/etc/nginx/conf.d/000-dockhand.conf')
    dh.cmd_install(plain.host)
    assert plain.read(dh.TOKEN_FILE) == token

@table('more, said, port, address', """
    EXPOSE 3000 => a web app: nginx passes requests to its port 3000 => 3000 => 10.86.0.2
    EXPOSE 5432 => a service that other apps reach as blog:5432, and => 5432 => 10.86.0.2
                => a worker without a port (a web app has an EXPOSE => 0 => 10.86.0.2""")
def test_a_push_says_what_the_app_is_where_that_is_new(plain, capfd, more, said, port, address):
    plain.nginx()
    plain.push(an_app('one', more), old=ZERO, new=SHA)
    assert '-----> blog is ' + said in capfd.readouterr().err
    live = plain.app.live()
    assert (str(live.port), live.web, live.addresses) == (
        port, said.startswith('a web'), [address])
    served = {'/etc/nginx/conf.d/blog.conf': plain_proxy(1, port=3000)}
    assert plain.served == (served if live.web else {})
    env = 'PORT=3000\n' if live.web else ''
    assert env_of(plain, 'blog--1') == env
    env = 'GIT_REV=%s\n' % SHA + env
    assert plain.files()['/var/lib/dockhand/apps/blog/releases/1/env'][:2] == (
        dh.to_bytes(env), '600')
    assert plain.running() == ['sha256:FROMone']
    plain.push(an_app('two', more))
    assert 'blog is a' not in capfd.readouterr().err
    plain.push(an_app('three', 'EXPOSE 8080'), MAIN, SHA_2, SHA_3)
    assert '-----> blog is a web app: nginx passes requests to its port 8080' in (
        capfd.readouterr().err)
    assert not re.search(r"'[^']*pending|build/blog|\.new", str(sorted(plain.files())))

def test_a_service_with_a_dot_in_its_name_is_told_that_nobody_can_ask_for_it():
    service = release(app='my.db', web=False, port=5432)
    assert dh.kind_text(service) == (
        'a service on port 5432 that no other app can reach by its name, for the dot in it')

def test_volumes_of_an_earlier_app_of_that_name_are_told(plain, capfd):
    plain.nginx()
    plain.volumes = ['blog--data', 'blogs--data', 'blog', 'x-blog--data', 'blog--old']
    plain.push(ONE_DATA, old=ZERO, new=SHA)
    assert re.findall('-----> (Found.*)', capfd.readouterr().err) == [
        'Found a volume of an earlier blog: ' + name
        for name in ('blog--data', 'blog--old')]
    plain.push(TWO_DATA)
    assert 'Found' not in capfd.readouterr().err

# ---- Receiving -------------------------------------------------------------------------

# What a key may reach, and what root checks again.

@contextmanager
def ssh_command(text):
    os.environ['SSH_ORIGINAL_COMMAND'] = text
    try:
        yield
    finally:
        del os.environ['SSH_ORIGINAL_COMMAND']

@table('command, name, apps, said', '''
    git-receive-pack 'blog' => bob => wiki wikis => the key "bob" has no right to blog: it
    git-upload-pack 'blog'  => bob => wiki       => the key "bob" has no right to blog: it
    git-upload-pack 'blog'  => bob => blog       => no app blog here
    git-receive-pack 'etc'  => bob =>            => /etc/init/etc.conf is on this server
    git-receive-pack 'ssh'  => bob =>            => the server itself
    git-receive-pack 'blog' => bob => --read-only => git push is not for the key "bob"
    git-upload-pack 'blog'  => bob => --read-only => no app blog here
    git-upload-pack 'blog'  => bob => blo-       => the key "bob" has no right to blog
    git-upload-pack 'blo-g' => bob => blo-       => no app blo-g here''')
def test_a_key_reaches_its_apps_and_nothing_else(plain, command, name, apps, said):
    plain.write('/etc/init/etc.conf', 'not ours')
    with ssh_command(command):
        assert said in refusal(dh.serve, plain.host, name, *apps.split())
    assert os.listdir(plain.host.path('/home/git')) == ['.ssh'] and plain.done == []

@pytest.fixture(params=['sh', 'bash'])
def program(request, plain):
    """Call what sshd runs, with the words behind `serve`: (`git` or `python`, who got it;
    its words; the names of its environment where it is git)."""
    shell, home = request.param, plain.host.path('/home/git')
    folder = plain.host.path('/usr/local/bin')
    for name in ('git', 'python'):
        plain.write('/usr/local/bin/' + name, '#!/bin/sh\necho %s\n'
                    'for word; do echo "$word"; done\necho --\nenv\n' % name)
        os.chmod(os.path.join(folder, name), 0o755)
    plain.write('/home/git/.ssh/dockhand/anna', '')
    for name in ('blog', 'docker', 'a--b', '', '.', '-x'):
        plain.write('/home/git/%s.git/HEAD' % name, '')
    plain.write('/var/lib/dockhand/apps/blog/live', '')
    text = dh.program_text(plain.host).replace('/home/git', home)
    text = text.replace(dh.STATE, plain.host.path(dh.STATE))
    text = text.replace('PATH=', 'PATH=%s:' % folder)
    text = text.replace('exec ' + dh.LIBRARY + '/dockhand ', 'exec %s/python ' % folder)

    def call(command, *words):
        env = {'SSH_ORIGINAL_COMMAND': command, 'SSH_CONNECTION': '1.2.3.4 5 6.7.8.9 22',
               'PATH': dh.ENVIRONMENT['PATH'], 'GIT_PROTOCOL': 'version=2',
               'GIT_DIR': '/tmp', 'LC_CTYPE': 'C'}
        asked = subprocess.Popen([shell, '-c', text, 'dockhand', 'serve'] + list(words),
                                 env=env, stdout=subprocess.PIPE)
        said = asked.communicate()[0].decode().replace(home, '/home/git')
        assert asked.returncode == 0
        (got, words), known = said.split('\n', 1), said.partition('\n--\n')[2]
        known = [line.replace(folder + ':', '') for line in known.splitlines()
                 if not line.startswith(('PWD=', '_=', 'SHLVL='))]
        return got, words.partition('--\n')[0].splitlines(), sorted(known)
    return call

@pytest.mark.parametrize('command, verb', [
    ("git-receive-pack 'blog.git'", 'receive-pack'),
    ("git-receive-pack '/blog.git'", 'receive-pack'),
    ("git-upload-pack 'blog.git'", 'upload-pack')])
def test_git_gets_at_once_what_serve_would_hand_to_it(
        program, plain, monkeypatch, command, verb):
    came = plain.host.path('/home/git/.ssh/dockhand/anna')
    os.utime(came, (1, 1))
    got, words, known = program(command, 'anna')
    assert os.stat(came).st_mtime > 1

    handed = []
    with ssh_command(command):
        os.environ.update(SSH_CONNECTION='1.2.3.4 5 6.7.8.9 22', GIT_PROTOCOL='version=2')
        try:
            monkeypatch.setattr(os, 'execvpe', lambda *words: handed.extend(words))
            dh.serve(plain.host, 'anna')
        finally:
            del os.environ['SSH_CONNECTION'], os.environ['GIT_PROTOCOL']
    root = plain.host.path('/home/git')
    assert ['git'] + words == [word.replace(root, '/home/git') for word in handed[1]]
    assert known == sorted('%s=%s' % (name, value.replace(root, '/home/git'))
                           for name, value in handed[2].items())
    assert got == 'git' and verb in words

@pytest.mark.parametrize('command, words', [
    ("git-receive-pack 'new.git'", ['anna']), ("git-receive-pack 'blog'", ['anna']),
    ("git-receive-pack 'blog.git'", ['anna', 'blog']), ("git-receive-pack 'blog.git'", []),
    ("git-receive-pack 'blog.git'", ['anna', '--read-only']),
    ("git-receive-pack 'blog.git'", ['../x']), ("git-upload-pack 'blog.git'", ['a/b']),
    ("git-receive-pack '../git/blog.git'", ['anna']),
    ("git-receive-pack 'x' 'blog.git'", ['anna']), ("git-receive-pack '.git'", ['anna']),
    ("git-receive-pack '//blog.git'", ['anna']), ("git-receive-pack 'blog.git';id", ['anna']),
    ("git-receive-pack '*.git'", ['anna']), ("git-receive-pack 'Blog.git'", ['anna']),
    ("git-receive-pack '$HOME/blog.git'", ['anna']), ("git-upload-archive 'blog.git'", ['anna']),
    ("git-receive-pack 'docker.git'", ['anna']), ("git-upload-pack 'a--b.git'", ['anna']),
    ("git-upload-pack '..git'", ['anna']), ("git-upload-pack '-x.git'", ['anna']),
    ("git-receive-pack 'blog.git'\n", ['anna']), ("git-receive-pack '\nblog.git'", ['anna']),
    ("x\ngit-receive-pack 'blog.git'", ['anna']), ('', ['anna']), ('apps', ['anna'])])
def test_all_that_sshd_hands_over_besides_is_pythons(program, plain, command, words):
    assert program(command, *words)[:2] == ('python', ['serve'] + words)
    assert not os.path.exists(plain.host.path('/home/git/.ssh/x'))

@table('words', r'''
    update
    update blog
    update blog anna
    update blog anna refs/heads/main {0}
    update blog anna refs/heads/main {0} HEAD
    update \_ anna refs/heads/main {0} {0}
    update ../x anna refs/heads/main {0} {0}
    update blog -x refs/heads/main {0} {0}
    post-receive blog
    post-receive Blog anna
    post-receive blog anna x
    post-receive blog anna x y
    post-receive blog anna ::1 1 ::1 x
    nonsense blog anna
    command
    command -x
    command nobody
    --help blog anna''', '')
def test_root_checks_again_what_the_git_user_asks(words):
    words = [word.strip('_') for word in words.replace('  ', '_ ').format(SHA).split(' ')]
    assert refusal(dh.receive, Host('/nowhere', run=None), *words)

# ---- Installing ------------------------------------------------------------------------

@each('enabler', '/usr/sbin/update-rc.d /sbin/rc-update')
def test_a_script_for_sysvinit_openrc_and_runit_is_installed_and_enabled(plain, enabler):
    plain.write(enabler, '')
    dh.make_folder(plain.host.path('/etc/init.d'))
    plain.update_rc_d = plain.rc_update = lambda *words: plain.write(
        '/etc/rc2.d/S01dockhand-recover', '')
    dh.cmd_install(plain.host)
    text = plain.read('/etc/init.d/dockhand-recover')
    assert mode_of(plain.host.path('/etc/init.d/dockhand-recover')) == '755'
    for line in ('# Provides:          dockhand-recover', '# X-Start-Before:    nginx',
                 '# Should-Start:      docker',
                 'start) exec /usr/local/bin/dockhand recover ;;'):
        assert line in text
    assert [line for line in plain.done if 'dockhand-recover' in line] == [
        {'/usr/sbin/update-rc.d': 'update-rc.d dockhand-recover defaults',
         '/sbin/rc-update': 'rc-update add dockhand-recover default'}[enabler]]
    files = plain.files()
    dh.cmd_install(plain.host)
    assert plain.files() == files

@pytest.mark.parametrize('harm, policy', [
    (lambda machine: None, 'always'), (lambda machine: dh.cmd_stop(machine.app), 'no')])
def test_an_app_of_an_older_dockhand_gets_todays_policy_by_install(plain, harm, policy):
    plain.lives(ONE_WEB)
    plain.containers['blog--1']['policy'] = 'unless-stopped'
    harm(plain)
    dh.cmd_install(plain.host)
    assert plain.containers['blog--1']['policy'] == policy

LAUNCHER = '''#!%s %s
import gc, os, sys
gc.disable()
sys.path.insert(0, '/usr/local/lib/dockhand')
import dockhand
os._exit(dockhand.main('{0}'))
''' % (sys.executable, '-Es' if sys.version_info[0] == 2 else '-IS')
RECEIVE = '/usr/local/lib/dockhand/receive'
HOOK = '#!/bin/sh\nexec sudo -n %s {0} "$DOCKHAND_APP" "$DOCKHAND_KEY"{1}\n' % RECEIVE
TEMPLATE = '/usr/local/lib/dockhand/template'
INSTALLED = [
    ('/usr/local/lib/dockhand/user', '644', 'git\n'),
    ('/usr/local/lib/dockhand/dockhand', '755', LAUNCHER.format('dockhand')),
    (RECEIVE, '755', LAUNCHER.format('receive')),
    ('/etc/sudoers.d/dockhand', '440', 'Defaults:git env_keep += "SSH_ORIGINAL_COMMAND '
     'SSH_CONNECTION"\ngit ALL=(root) NOPASSWD: %s\n' % RECEIVE),
    (TEMPLATE + '/hooks/update', '755', HOOK.format('update', ' "$@"')),
    (TEMPLATE + '/hooks/post-receive', '755', HOOK.format('post-receive', ' "$SSH_CONNECTION"')),
    (TEMPLATE + '/config', '644', '''[core] bare = true
[core] hooksPath = hooks
[receive] shallowUpdate = true
[receive] unpackLimit = 1
[receive] denyDeleteCurrent = ignore
[transfer] hideRefs = refs/dockhand
[gc] autoPackLimit = 20
[gc] bigPackThreshold = 32m
[gc] autoDetach = false
'''),
    ('/etc/nginx/conf.d/000-dockhand.conf', '644', TOLD_ALL)]
BOOT = {'none': [], 'upstart': [('/etc/init/dockhand-recover.conf', '644', '''\
description "dockhand: put right what a crash left of a deploy"
start on started docker
task
exec /usr/local/bin/dockhand recover
''')], 'systemd': [('/etc/systemd/system/dockhand-recover.service', '644', '''[Unit]
Description=dockhand: put right what a crash left of a deploy
After=docker.service
Before=nginx.service
[Service]
Type=oneshot
ExecStart=/usr/local/bin/dockhand recover
[Install]
WantedBy=multi-user.target docker.service
''')]}

@pytest.fixture(params=['none', 'upstart', 'systemd'])
def fresh(request, tmpdir):
    return Machine(tmpdir, request.param)

def test_install_writes_these_files_and_a_second_one_changes_nothing(fresh, capfd):
    fresh.write(dh.TOKEN_FILE, 'abcd1234\n')
    dh.cmd_install(fresh.host)
    for path, mode, text in INSTALLED + BOOT[fresh.init]:
        assert (fresh.read(path), mode_of(fresh.host.path(path))) == (text, mode), path
    assert fresh.read('/usr/local/lib/dockhand/dockhand.py') == dh.read_file(
        re.sub('pyc$', 'py', dh.__file__))
    files = fresh.files()
    assert files['/usr/local/bin/gitreceive'][0] == '/usr/local/bin/dockhand'
    for name in ('multi-user.target', 'docker.service'):
        link = '/etc/systemd/system/%s.wants/dockhand-recover.service' % name
        linked = dh.UNIT if fresh.init == 'systemd' else None
        assert files.get(link, [None])[0] == linked
    assert fresh.wanted == (dh.UNIT_ENABLED if fresh.init == 'systemd' else [])
    assert files['/var/lib/dockhand/build'][1:] == ('700', (USER, GROUP))
    assert fresh.served is not None
    out, done = capfd.readouterr().out, set(fresh.done)
    assert 'wrote /etc/sudoers.d/dockhand\n' in out and 'is installed; next: ' in out
    del fresh.done[:]
    dh.cmd_install(fresh.host)
    assert fresh.files() == files and capfd.readouterr().out == 'nothing changed\n'
    asked = ['systemctl daemon-reload'] * (fresh.init == 'systemd')
    assert set(fresh.done) == set(asked + ['sudo -n %s check' % RECEIVE]) < done

def test_install_compiles_the_script_when_that_is_newer_and_not_again(plain, capfd):
    dh.cmd_install(plain.host)
    script = plain.host.path('/usr/local/lib/dockhand/dockhand.py')
    compiled = dh.compiled_path(script)
    written = 10 ** 9
    os.utime(script, (written, written))

    def made_anew(age):
        """Whether install writes the compiled form, which is older than the script."""
        os.utime(compiled, (written - age, written - age))
        before = os.stat(compiled).st_mtime
        capfd.readouterr()
        dh.cmd_install(plain.host)
        is_new = os.stat(compiled).st_mtime != before
        said = capfd.readouterr().out
        assert said.startswith(
            'wrote ' + dh.compiled_path(dh.LIBRARY + '/dockhand.py') if is_new
            else 'nothing changed\n')
        return is_new
    assert [made_anew(age) for age in (-9, 0, 9, -9)] == [False, False, True, False]
    os.unlink(compiled)
    dh.cmd_install(plain.host)
    assert os.path.exists(compiled)

@pytest.mark.skipif(os.getuid() != 0, reason='only root makes what git cannot write')
def test_install_goes_on_where_a_repository_is_not_the_git_users(plain, capfd):
    plain.lives(ONE_WEB)
    dh.make_folder(plain.host.path('/home/git/blog.git/hooks'))
    assert '2 file(s) could not be written' in refusal(dh.cmd_install, plain.host)
    assert ('dockhand: /home/git/blog.git/hooks/update: as the user git: '
            in capfd.readouterr().err)
    assert plain.read('/usr/local/bin/dockhand') and plain.read(dh.TOKEN_FILE)

def test_install_makes_the_user(plain):
    plain.write('/etc/passwd', 'root:x:0:0::/root:/bin/sh\n')
    dh.cmd_install(plain.host, user='push')
    assert 'useradd -m -d /home/push -s /bin/sh -p * push' in plain.done
    assert plain.read('/etc/sudoers.d/dockhand').startswith('Defaults:push env_keep')
    assert plain.read('/usr/local/lib/dockhand/user') == 'push\n'
    assert dh.installed_user(plain.host) == 'push'

def test_the_user_of_an_older_installation_is_in_its_launcher_alone(plain):
    assert dh.installed_user(plain.host) == 'git'
    plain.write('/usr/local/bin/dockhand',
                "os._exit(dockhand.main('dockhand', 'push'))\n")
    assert dh.installed_user(plain.host) == 'push'

@table('line', '''
    git:x:0:0::/home/git:/bin/sh
    git:x:99:99::/home/git:/usr/sbin/nologin
    git:x:99:99::/home/git:/usr/bin/git-shell
    git:x:99:99::/home/git:/bin/false''')
def test_install_does_not_take_somebody_elses_user(plain, line):
    plain.write('/etc/passwd', line + '\n')
    before = plain.files()
    assert '--user NAME takes another' in refusal(dh.cmd_install, plain.host)
    assert plain.files() == before

def test_install_refuses_user_names_that_are_none(plain):
    assert 'is no name' in refusal(dh.cmd_install, plain.host, 'x;id')

def test_install_names_every_missing_requirement_at_once(plain, capfd):
    plain.which = lambda name: '' if name in ('nginx', 'visudo') else '/usr/bin/' + name
    plain.broken['docker version'] = 2
    before = plain.files()
    assert refusal(dh.cmd_install, plain.host) == '3 thing(s) to mend'
    assert re.findall('WRONG  (.*)\n +type: (.*)', capfd.readouterr().out) == [
        ('nginx is missing', 'apt-get update; apt-get install nginx'),
        ('visudo is missing', 'apt-get update; apt-get install sudo'),
        ('docker does not answer: broken on purpose',
         'service docker start || dockerd &')]
    assert plain.files() == before and plain.done == []

def test_a_sudoers_file_that_sudo_would_not_read_is_not_put_in_place(plain):
    plain.broken['visudo -c -q -f /etc/sudoers.d/.dockhand.new'] = 1
    assert refusal(dh.cmd_install, plain.host).startswith('visudo -c -q -f')
    assert os.listdir(plain.host.path('/etc/sudoers.d')) == []

def test_a_sudo_that_ignores_the_file_is_named(plain, capfd):
    plain.broken['sudo -n'] = 1
    assert refusal(dh.cmd_install, plain.host) == '1 thing(s) to mend'
    assert 'must have `#includedir /etc/sudoers.d`' in capfd.readouterr().out

def test_the_default_site_is_disabled_only_if_it_is_untouched(plain):
    site, link = '/etc/nginx/sites-available/default', '/etc/nginx/sites-enabled/default'
    plain.write(site, 'server { listen 80 default_server; }')
    dh.make_folder(plain.host.path('/etc/nginx/sites-enabled'))
    os.symlink('../sites-available/default', plain.host.path(link))
    for text, kept in (('edited', True), (plain.read(site), False)):
        checksum = hashlib.md5(dh.to_bytes(text)).hexdigest()
        plain.dpkg_query = lambda *words: ' %s %s\n' % (site, checksum)
        dh.cmd_install(plain.host)
        assert os.path.lexists(plain.host.path(link)) == kept and plain.read(site)

def test_a_broken_nginx_is_said_before_the_catch_all_is_written(plain):
    plain.broken['nginx -t'] = 2
    assert 'is broken, mend it first' in refusal(dh.cmd_install, plain.host)
    assert plain.read(dh.CATCH_ALL) is None

# ---- Command lines ---------------------------------------------------------------------

@table('pattern, words, given, options', '''
    =>                        =>                =>
    APP             => blog           => blog           =>
    [--user NAME]   =>                =>                =>
    [--user NAME]   => --user bob     =>                => user=bob
    [--user NAME]   => --user=bob     =>                => user=bob
    APP [-f] [-n N] => -f blog -n 5   => blog           => f=True n=5
    APP [-n N]      => blog -n -1     => blog           => n=-1
    APP [-n N]      => blog -n5       => blog           => n=5
    APP [-f]        => -f -- -blog    => -blog          => f=True
    A [B...] [--un] => x --un K1 K2   => x K1 K2        => un=True
    A [B...] [--un] => x K1 K2 --un   => x K1 K2        => un=True
    A [B...] [--un] => x K=- L=1      => x K=- L=1      =>
    NAME [APP...]   => anna           => anna           =>
    NAME [APP...]   => anna blog wiki => anna blog wiki =>
    APP [--pull]    => --pull -       => -              => pull=True
    APP [N]         => blog           => blog           =>
    APP [N]         => blog 3         => blog 3         =>''')
def test_a_command_line_is_read_by_its_pattern(pattern, words, given, options):
    found = dh.parse_arguments(pattern, words.split())
    assert found[0] == given.split()
    assert ' '.join(sorted('%s=%s' % pair for pair in found[1].items())) == options

@table('pattern, words', '''
    => x
    APP           =>
    APP           => a b
    NAME [APP...] =>
    APP [-f]      => a -x
    APP [-f]      => -f
    APP [N]       => a 3 4
    APP           => a -h
    APP [-n N]    => a -n
    APP [--pull]  => a --pull=1
    [--user NAME] => --user''')
def test_a_command_line_that_does_not_fit_its_pattern_is_a_usage_error(pattern, words):
    with pytest.raises(dh.Usage):
        dh.parse_arguments(pattern, words.split())

def test_each_command_takes_what_its_pattern_promises():
    for _, pattern, _, _, function in dh.COMMANDS:
        code = function.__code__
        options = re.findall(r'\[--?([a-z]+)', pattern)
        words = re.sub(r'\[-.*?\]|\[.*\.\.\.\]', '', pattern).strip()
        words = words.replace('[N]', 'number').replace('[APP]', 'name')
        words = words.replace('[PROCESS]', 'process').replace('[add|remove]', 'verb')
        words = words.replace('[NAME]', 'name')
        words = words.strip('[]').lower().split()
        words = [word for word in words if word != 'app']       # it is an App by then
        taken = [] if code.co_flags & 8 else options            # **options takes any
        assert sorted(code.co_varnames[1:code.co_argcount]) == sorted(words + taken)
        assert function.__doc__ and bool(code.co_flags & 4) == ('...' in pattern)

def test_unknown_commands_are_usage_errors_and_none_lists_all(capfd):
    host = Host('/nowhere', run=None)
    for words in (['nonsense'], ['\x1b[2J'], ['install', 'x'], ['logs']):
        with pytest.raises(dh.Usage):
            dh.run_command(host, words)
    for words in ([], ['help'], ['--help']):
        dh.run_command(host, words)
        out = capfd.readouterr().out
        assert all('\n  %s ' % verb.name in out for verb in dh.COMMANDS)
        assert max(map(len, out.splitlines())) <= 90 and out.count('\n') <= 30

@table('line', '''
    help rollback
    --help rollback
    rollback --help
    rollback -h
    rollback blog --help
    rollback blog 3 -h''')
def test_a_command_says_how_it_is_called_and_does_nothing(line, capfd):
    dh.run_command(Host('/nowhere', run=None), line.split())
    assert capfd.readouterr().out == (
        'dockhand rollback APP [N]\n  go back to an earlier release, its config too\n\n'
        '  To the one that was live before, or to release N: see `releases`.\n\n'
        '  for every key but those with --read-only\n')

@table('line', '''
    help nonsense
    nonsense --help
    help rollback blog
    --version rollback
    --nonsense''')
def test_help_that_nobody_can_give_is_a_usage_error(line, capfd):
    with pytest.raises(dh.Usage):
        dh.run_command(Host('/nowhere', run=None), line.split())
    assert capfd.readouterr().out == ''

def test_the_version_is_the_beginning_of_what_sha256sum_says_of_the_script(capfd):
    dh.run_command(Host('/nowhere', run=None), ['--version'])
    with open(os.path.join(HERE, 'dockhand.py'), 'rb') as script:
        digest = hashlib.sha256(script.read()).hexdigest()
    assert capfd.readouterr().out == 'dockhand %s, Python %s\n' % (
        digest[:12], '%d.%d.%d' % sys.version_info[:3])

# ---- Commands: upload-key, keys, remove-key --------------------------------------------

@contextmanager
def standard_input(data):
    kept, stream = sys.stdin, io.BytesIO(data)
    sys.stdin = stream if sys.version_info[0] == 2 else io.TextIOWrapper(stream)
    try:
        yield
    finally:
        sys.stdin = kept

def upload(machine, text, *words, **options):
    with standard_input(dh.to_bytes(text)):
        dh.cmd_upload_key(machine.host, *words, **options)

KEYS_FILE = '/home/git/.ssh/authorized_keys'

def test_keys_are_added_and_removed_between_the_lines_of_others(plain, capfd):
    os.chmod(plain.host.path('/home/git'), 0o750)
    upload(plain, LINE, 'anna')
    plain.write(KEYS_FILE, "ssh-rsa AAAA admin's own\n" + plain.read(KEYS_FILE))
    upload(plain, LINE_2 + '\r\n', 'bob', 'blog', 'wiki')
    assert plain.read(KEYS_FILE) == KEYS_TEXT.replace('ssh-rsa BBBB another\n', '')
    files = plain.files()
    assert files[KEYS_FILE][1:] == ('600', (USER, GROUP))
    assert files['/home/git/.ssh'][1:] == ('700', (USER, GROUP))
    assert files['/home/git'][1] == '750'
    assert capfd.readouterr().out == (
        'anna ssh-ed25519 %s may push and manage every app\n'
        'bob ssh-ed25519 %s may push and manage blog wiki\n' % (
            'SHA256:' + ED[-8:], 'SHA256:' + ED_2[-8:]))
    upload(plain, LINE, 'anna')
    assert capfd.readouterr().out.startswith('anna ssh-ed25519 ')
    dh.cmd_keys(plain.host)
    assert [(line.split()[0], line.partition(' may ')[2])
            for line in capfd.readouterr().out.splitlines()] == [
                ('anna', 'push and manage every app'),
                ('bob', 'push and manage blog wiki')]
    dh.cmd_remove_key(plain.host, 'anna')
    assert plain.read(KEYS_FILE) == "ssh-rsa AAAA admin's own\n" + keys_text(KEYS[1])

@pytest.mark.skipif(os.getuid() != 0, reason='only root has rights to give up')
@pytest.mark.parametrize('link, target', [
    ('.ssh', '/etc/ssh'), ('.ssh/authorized_keys', '/etc/shadow'),
    ('.ssh/.authorized_keys.new', '/etc/shadow'), ('blog.git', '/etc/ssh'),
    ('blog.git/hooks', '/etc/ssh'), ('blog.git/hooks/update', '/etc/shadow')])
def test_root_follows_no_link_of_the_git_user(plain, link, target):
    plain.lives(ONE_WEB)
    for path in ('/etc/ssh/index.lock', '/etc/shadow', '/etc/ssh/refs/heads/main.lock',
                 '/etc/ssh/authorized_keys', '/etc/ssh/hooks/update', '/etc/ssh/update'):
        plain.write(path, "root's own\n")
        os.chmod(plain.host.path(path), 0o600)
    plain.write('/home/git/blog.git/hooks/update', 'old\n')
    path = plain.host.path('/home/git', link)
    shutil.rmtree(path, ignore_errors=True)
    dh.remove_file(path)
    os.symlink(plain.host.path(target), path)
    before = dict((name, about) for name, about in plain.files().items()
                  if name.startswith('/etc/s'))

    acts = [functools.partial(upload, plain, LINE, 'bob'),
            functools.partial(dh.cmd_install, plain.host),
            functools.partial(dh.cmd_remove_key, plain.host, 'anna'),
            functools.partial(dh.cmd_recover, plain.host),
            functools.partial(dh.cmd_destroy, plain.app, force=True)]
    for act in acts:
        dh.attempt(link, act)
        now = plain.files()
        assert [name for name in before if now.get(name) != before[name]] == []
        assert "root's own" not in [about[0] for name, about in now.items()
                                    if name.startswith('/home')]

def test_a_key_that_goes_but_still_logs_in_is_told(plain, capfd):
    plain.write(KEYS_FILE, 'ssh-ed25519 %s mine\n%s' % (ED, KEYS_TEXT))
    dh.cmd_remove_key(plain.host, 'anna')
    assert capfd.readouterr().out == (
        'anna may push no longer\nbut /home/git/.ssh/authorized_keys:1 is not of '
        'dockhand, and lets the same key log in as git\n')

@pytest.mark.parametrize('text, words', [
    (LINE + LINE_2, ['anna']), (LINE.split(' anna')[0] + ' x' + LINE_2, ['anna']),
    (LINE + '\nno', ['anna']), ('#' * 300000, ['anna']), (LINE_2, ['anna']),
    (LINE_3, ['-x']), (LINE, ['anna', 'Blog']), (LINE, ['anna'] + ['a' * 40] * 300)])
def test_an_upload_that_is_refused_changes_no_key(plain, text, words):
    plain.write(KEYS_FILE, KEYS_TEXT)
    assert refusal(upload, plain, text, *words)
    assert plain.read(KEYS_FILE) == KEYS_TEXT

def test_a_key_that_this_servers_openssh_does_not_know_is_refused(plain):
    plain.broken['ssh-keygen -l -f '] = 1
    assert 'no key that OpenSSH here knows' in refusal(upload, plain, LINE, 'anna')
    assert ED not in str(plain.read(KEYS_FILE))

@each('name', '.* ann Anna * annaa', '')
def test_names_of_keys_are_compared_not_matched(plain, name):
    plain.write(KEYS_FILE, KEYS_TEXT)
    assert 'no key is named "%s"' % name in refusal(dh.cmd_remove_key, plain.host, name)
    assert plain.read(KEYS_FILE) == KEYS_TEXT

# ---- Commands: apps, stop, start, releases, rollback -----------------------------------

def test_a_rollback_brings_back_image_job_proxy_and_branch_without_a_build(machine):
    before = pushed(machine, SHA_2)
    dh.cmd_rollback(machine.app)
    found = machine.whole()
    for key in ('blog:2', 'blog--2', 'refs', 'jobs'):
        before.pop(key, None), found.pop(key, None)
    record = '/var/lib/dockhand/apps/blog/releases/1/release.json'
    assert '"turn": 2' in dh.to_text(found.pop(record)[0]) and before.pop(record)
    assert found == before and machine.refs[MAIN] == SHA
    assert not [line for line in machine.done if line.startswith('docker build')]
    dh.cmd_rollback(machine.app, '2')
    assert machine.running() == ['sha256:FROM222'] and machine.refs[MAIN] == SHA_2

@table('number, said', '''
    1 => its image blog:1 was removed, so nothing has changed: choose another
    2 => no release 2 to go back to: see dockhand releases blog
    3 => no release 3 to go back to: see dockhand releases blog
    x => no release x to go back to: see dockhand releases blog''')
def test_a_rollback_to_what_cannot_run_changes_nothing(machine, number, said):
    pushed(machine, SHA_2)
    assert refusal(machine.push, but('docker', 'FROM dies'), MAIN, SHA_2, SHA_3)
    del machine.images['blog:1']
    before = machine.whole()
    assert refusal(dh.cmd_rollback, machine.app, number) == said
    assert machine.changed(before) == []

def test_a_first_release_has_none_to_go_back_to(plain):
    plain.lives(FILES)
    assert refusal(dh.cmd_rollback, plain.app) == (
        'no other release to go back to: see dockhand releases blog')

def test_a_restart_lets_nobody_in_between(plain):
    plain.lives(ONE_WEB)
    with counted_locks() as taken:
        dh.cmd_restart(plain.app)
    assert taken.count('blog') == 1 and plain.running() == ['sha256:FROMone']

@contextmanager
def counted_locks():
    """The names of the locks that are taken meanwhile."""
    taken, locked = [], dh.locked

    def counting(path, purpose):
        taken.append(os.path.basename(path))
        return locked(path, purpose)
    dh.locked = counting
    try:
        yield taken
    finally:
        dh.locked = locked

def test_an_app_that_does_not_start_stays_stopped(plain):
    plain.lives(an_app('one', CHECKED))
    dh.cmd_stop(plain.app)
    start = plain.docker_start
    plain.docker_start = lambda *words: start(*words) or plain.containers['blog--1'][
        'State'].update(Health={'Status': 'unhealthy'})
    assert 'HEALTHCHECK says unhealthy' in refusal(dh.cmd_start, plain.app)
    assert plain.running() == [] and plain.app.is_stopped()

def test_a_rollback_says_what_of_the_config_goes_back_too(plain, capfd):
    plain.lives(ONE_WEB)
    dh.cmd_config(plain.app, 'A=1', 'domains=here.org')
    dh.cmd_rollback(plain.app)
    assert '-----> Its config too, for later pushes as well: A domains\n' in (
        capfd.readouterr().err)
    assert plain.app.config() == {}

def test_doctor_finds_a_proxy_file_that_somebody_changed(healthy, capfd):
    path = '/etc/nginx/conf.d/blog.conf'
    healthy.write(path, healthy.read(path) + '# mine\n')
    assert refusal(dh.cmd_doctor, healthy.host)
    assert path + ' was changed on the server' in capfd.readouterr().out

def test_a_job_that_does_not_see_its_variables_is_noted(plain, capfd):
    plain.lives(FILES)
    dh.cmd_config(plain.app, 'A=1')
    assert 'Note: its upstart.conf has no `--env-file /var/lib/dockhand/apps/blog/env`' in (
        capfd.readouterr().err)
    assert 'overlap is for apps without a job' in refusal(
        dh.cmd_config, plain.app, 'overlap=yes')

def made_by(machine):
    """[(who, what)] of its releases, as they were written down."""
    releases = [machine.app.load(number) for number in machine.app.numbers()]
    return [(each.by, each.how) for each in releases]

@pytest.fixture
def logged(monkeypatch):
    """What goes to the system's log."""
    lines = []
    import syslog
    monkeypatch.setattr(syslog, 'syslog', lines.append)
    return lines

@pytest.mark.parametrize('environment, name', [
    ({}, 'root'), ({'SUDO_USER': 'carl'}, 'carl'), ({'DOAS_USER': 'carl'}, 'carl'),
    ({'SUDO_USER': 'ca\nrl'}, 'ca?rl')])
def test_who_did_what_is_written_down(plain, logged, monkeypatch, environment, name):
    for variable in ('SUDO_USER', 'DOAS_USER'):
        monkeypatch.delenv(variable, raising=False)
    for variable in environment:
        monkeypatch.setenv(variable, environment[variable])
    plain.lives(ONE_WEB)
    plain.push(TWO_WEB)
    dh.cmd_config(plain.app, 'domains=a.org', 'A=1')
    dh.cmd_rebuild(plain.app)
    dh.cmd_rollback(plain.app, '3')
    assert made_by(plain) == [('anna', 'push'), (name, 'config A domains'),
                              (name, 'rebuild')]
    assert plain.app.live().revived['by'] == name
    for act in (dh.cmd_stop, dh.cmd_start, dh.cmd_restart):
        act(plain.app)
    dh.cmd_destroy(plain.app, force=True)
    said = [re.sub('[0-9a-f]{40}', 'ID', line) for line in logged]
    assert said == ['blog: ' + line % {'who': name} for line in '''
        release 2 of ID is live: push by anna
        release 3 of ID is live: config A domains by %(who)s
        release 4 of ID is live: rebuild by %(who)s
        release 3 of ID is live again: rollback from 4 by %(who)s
        stop by %(who)s
        start by %(who)s
        restart by %(who)s
        destroy by %(who)s'''.split('\n        ')[1:]]

def test_a_rollback_says_who_went_back_and_since_when(plain, capfd):
    pushed(plain, SHA_2)
    dh.cmd_rollback(plain.app)
    capfd.readouterr()
    dh.cmd_releases(plain.app)
    assert re.search(r'(?m)^   1 .* anna .* live again since [\d-]+ [\d:]+: '
                     'rollback by root$', capfd.readouterr().out)
    dh.cmd_apps(plain.host)
    assert re.search(r' 1{10}  \d{4}-\d\d-\d\d \d\d:\d\d  root ', capfd.readouterr().out)
    dh.cmd_rollback(plain.app)
    capfd.readouterr()
    dh.cmd_releases(plain.app)
    assert re.search('(?m)^   1 .* kept$', capfd.readouterr().out)

def test_releases_are_listed_with_what_became_of_them(plain, capfd):
    pushed(plain, SHA_2)
    assert refusal(plain.push, but('job', 'x\n'), MAIN, SHA_2, SHA_3)
    capfd.readouterr()
    dh.cmd_releases(plain.app)
    lines = capfd.readouterr().out.splitlines()
    assert re.match(r'   3  3{10}  \d{4}-\d\d-\d\d \d\d:\d\d  anna +-  failed: '
                    'upstart.conf:1: `x`: an unknown stanza', lines[0])
    assert re.match(r'   2  2{10}  .*  anna +\d+\.\d s  live\Z', lines[1])
    assert re.match(r'   1  1{10}  .*  anna +2\.5 s  kept\Z', lines[2])
    assert 'no app wiki is live here' in refusal(dh.cmd_releases,
                                                 dh.App(plain.host, 'wiki'))

def test_apps_lists_whatever_has_anything_here_and_what_it_waits_for(plain, capfd):
    plain.nginx()
    dh.make_folder(plain.host.path('/home/git/empty.git'))
    dh.make_folder(plain.host.path('/home/git/No_app.git'))
    dh.cmd_config(dh.App(plain.host, 'noted'), 'A=1')
    assert refusal(lambda: plain.push(but('docker', 'FROM dies'), old=ZERO))
    capfd.readouterr()
    dh.cmd_apps(plain.host)
    lines = [line.split(None, 2) for line in capfd.readouterr().out.splitlines()]
    assert lines == [
        ['blog', 'waiting',
         'for a push that succeeds; the last one: release 1 failed its health '
         'check: it does not run: exited with 1'],
        ['empty', 'waiting', 'for its first push'],
        ['noted', 'waiting', 'for its first push']]

def test_releases_and_logs_of_an_app_that_never_went_live_say_why(plain, capfd):
    plain.nginx()
    assert refusal(lambda: plain.push(but('docker', 'FROM dies'), old=ZERO))
    capfd.readouterr()
    dh.cmd_releases(plain.app)
    assert 'failed: release 1 failed its health check' in capfd.readouterr().out
    assert 'it waits for a push that succeeds; the last one: release 1 failed' in refusal(
        dh.cmd_logs, plain.app)
    assert 'no app nobody is live here' in refusal(dh.cmd_logs,
                                                   dh.App(plain.host, 'nobody'))
    dh.cmd_destroy(plain.app, force=True)
    dh.cmd_apps(plain.host)
    assert 'blog' not in capfd.readouterr().out.replace('blog is removed', '')

def test_apps_are_listed_with_state_commit_key_and_address(healthy, capfd):
    for state in ('running', 'stopped'):
        dh.cmd_apps(healthy.host)
        row = capfd.readouterr().out.split()
        assert row[:3] == ['blog', state, '1' * 10]
        assert row[-2:] == ['anna', 'http://blog.example.org/']
        dh.cmd_stop(healthy.app)
        capfd.readouterr()

def test_an_app_in_every_domain_is_listed_with_what_asks_it_whatever_dns_says(
        plain, capfd):
    plain.lives(ONE_WEB)
    dh.cmd_apps(plain.host)
    assert capfd.readouterr().out.endswith(
        " anna       curl -H 'Host: blog' http://127.0.0.1/\n")

# ---- Commands: config, proxy -----------------------------------------------------------

def test_a_proxy_file_to_start_from_is_printed(plain, capfd):
    plain.lives(an_app('one', 'EXPOSE 8000', PUSHED))
    plain.write('/proc/net/if_inet6', '')
    capfd.readouterr()
    dh.cmd_proxy(plain.app)
    printed = capfd.readouterr().out
    assert printed == generated('blog', 'blog blog.*', SIX % '' + LARGE, **BLOG_LOGGED)
    plain.push(an_app('two', 'EXPOSE 8000', printed))
    assert PROXY_HEADER + printed in plain.served['/etc/nginx/conf.d/blog.conf']

def test_an_app_without_a_made_proxy_file_has_none_to_print(plain):
    assert 'no app blog is live' in refusal(dh.cmd_proxy, plain.app)
    plain.lives(an_app('one', ''))
    assert 'blog is no web app' in refusal(dh.cmd_proxy, plain.app)

CONFIG = '/var/lib/dockhand/apps/blog/config'

def test_config_may_be_set_before_the_first_push(plain, capfd):
    plain.nginx()
    dh.cmd_config(plain.app, 'port=9000', 'A=it\'s "x" #1', 'release=migrate --all')
    assert capfd.readouterr().out == 'blog: noted for its first push\n'
    assert plain.files()[CONFIG][1] == '600' and plain.done == [
        'rm -rf -- ' + ' '.join('/var/lib/dockhand/apps/blog/' + part for part in (
            'releases', 'env', 'live'))] * len(plain.done)
    dh.cmd_recover(plain.host)
    assert refusal(lambda: plain.push(an_app('dies'), old=ZERO, new=SHA))
    assert json.loads(plain.read(CONFIG)) == {
        'settings': {'port': '9000', 'release': 'migrate --all'},
        'variables': {'A': 'it\'s "x" #1'}}
    plain.push(ONE_WEB, old=ZERO, new=SHA)
    live = plain.app.live()
    assert (live.port, live.config['port']) == (9000, '9000')
    assert env_of(plain, 'blog--2') == 'A=it\'s "x" #1\nPORT=9000\n'

@each('path', '/etc/init/blog.conf /etc/init.d/blog /etc/nginx/conf.d/blog.conf')
def test_config_does_not_make_a_name_of_the_servers_free(plain, path):
    plain.write(path, 'not ours')
    try:
        dh.cmd_config(plain.app, 'A=1')
    except Failure:
        pass
    assert path in refusal(lambda: plain.push(ONE_WEB, old=ZERO, new=SHA))
    assert plain.read(path) == 'not ours'

CHANGED = 'docker tag sha256:FROMone blog:2\n'

def test_a_change_of_config_is_a_release_of_the_same_image(plain, capfd):
    plain.lives(ONE_WEB, A='1', B='2')
    capfd.readouterr()
    dh.cmd_config(plain.app, 'A=new', 'domains=blog.org www.blog.org', 'B', unset=True)
    assert '\n'.join(plain.done) + '\n' == (
        CHANGED + LAUNCHED.replace('two', 'one') % '' + HANDED_OVER
        + 'timeout 2 getent ahosts blog.org\n')
    assert env_of(plain, 'blog--2') == 'A=new\nPORT=8000\n'
    assert plain.served == {
        '/etc/nginx/conf.d/blog.conf': plain_proxy(2, 'blog.org www.blog.org')}
    live, wanted = plain.app.live(), {
        'A': 'new', 'domains': 'blog.org www.blog.org'}
    assert live.config == plain.app.config() == wanted
    assert (live.number, live.commit, live.image) == (2, SHA, 'sha256:FROMone')
    assert 'Release 2 is live' in capfd.readouterr().err
    dh.cmd_rollback(plain.app)
    assert plain.app.config() == {'A': '1', 'B': '2'}
    assert plain.served == {'/etc/nginx/conf.d/blog.conf': plain_proxy(1)}
    assert plain.running() == ['sha256:FROMone']

def test_config_prints_values_of_secrets_on_request_only(plain, capfd):
    plain.lives(ONE_WEB, SECRET='a b=#"', port='8000')
    capfd.readouterr()
    dh.cmd_config(plain.app)
    assert capfd.readouterr().out == 'SECRET=(see it with --values)\nport=8000\n'
    dh.cmd_config(plain.app, values=True)
    assert capfd.readouterr().out == 'SECRET=a b=#"\nport=8000\n'
    dh.cmd_config(plain.app, 'port=8000')
    assert plain.done == []

@pytest.mark.parametrize('words, unset, said', [
    (['A=1', 'no'], {}, '"no" is not KEY=VALUE'), (['A=a\0b'], {}, 'text in UTF-8'),
    (['A=1', 'B'], {'unset': True}, 'no B is set'),
    (['domains=wiki.org'], {}, '"wiki.org" is taken')])
def test_a_config_that_is_refused_changes_nothing(plain, words, unset, said):
    plain.write('/etc/nginx/conf.d/wiki.conf', 'server { server_name wiki.org; }')
    plain.lives(ONE_WEB, A='0')
    before, containers = plain.whole(), str(plain.containers)
    assert said in refusal(lambda: dh.cmd_config(plain.app, *words, **unset))
    assert plain.changed(before) == [] and str(plain.containers) == containers

@table('names, said', """
    wiki.org => server_name "wiki.org" is taken on port 80, by /etc/nginx/conf.d/wiki.conf
    b broken => broken""")
def test_host_names_that_will_not_do_are_told_as_config_has_them(plain, names, said):
    """The file that is made of them is none that anybody has written."""
    plain.write('/etc/nginx/conf.d/wiki.conf', 'server { server_name wiki.org *.org; }')
    plain.lives(ONE_WEB)
    told = refusal(dh.cmd_config, plain.app, 'domains=' + names)
    assert told.startswith('domains="%s": %s' % (names, said))

def test_a_rule_that_only_warns_says_config_too(plain, capfd):
    plain.write('/etc/nginx/conf.d/wiki.conf', 'server { server_name *.org; }')
    plain.lives(ONE_WEB)
    dh.cmd_config(plain.app, 'domains=*.wiki.org')
    note = 'Note: domains="*.wiki.org": "*.wiki.org" would take requests from wiki'
    assert note in capfd.readouterr().err

def test_the_names_that_an_app_has_unasked_are_told_with_what_sets_others(plain):
    plain.nginx()
    plain.write('/etc/nginx/conf.d/wiki.conf', 'server { server_name blog; }')
    told = refusal(lambda: plain.push(ONE_WEB, old=ZERO, new=SHA))
    assert told == ('the host names blog blog.* (others: dockhand config blog '
                    'domains="NAME..."): server_name "blog" is taken on port 80, by '
                    'something else here: change one of the two')

def test_a_made_file_that_clashes_is_not_told_as_one_of_the_repository(plain):
    plain.write('/etc/nginx/conf.d/old.conf', 'upstream blog { server x; }\n')
    plain.nginx()
    told = refusal(lambda: plain.push(ONE_WEB, old=ZERO, new=SHA))
    assert 'nginx-proxy.conf' not in told and 'upstream blog' in told

def test_a_file_that_somebody_wrote_for_a_worker_is_not_overwritten_when_it_gets_a_port(plain):
    plain.lives(an_app('one', ''))
    mine, path = 'server { server_name mine; }', '/etc/nginx/conf.d/blog.conf'
    plain.write(path, mine)
    before = plain.whole()
    for act in (lambda: plain.push(ONE_WEB), lambda: dh.cmd_config(plain.app, 'port=80')):
        assert 'conf.d/blog.conf is on this server already' in refusal(act)
        assert plain.read(path) == mine and plain.app.live().number == 1
        assert plain.running() == before['running']

def test_a_job_that_somebody_wrote_is_not_overwritten_when_an_app_gets_one(tmpdir):
    machine = Machine(tmpdir, 'upstart')
    machine.lives(an_app('one', ''))
    machine.write('/etc/init/blog.conf', 'exec mine')
    assert 'init/blog.conf is on this server already' in refusal(machine.push, FILES)
    assert machine.read('/etc/init/blog.conf') == 'exec mine'

@pytest.mark.parametrize('exposed', ['EXPOSE 9000', 'CMD x'])
def test_a_port_that_is_unset_makes_no_web_app_any_more(plain, exposed):
    plain.lives(an_app('one', exposed), port='9000')
    assert plain.app.live().web
    dh.cmd_config(plain.app, 'port', unset=True)
    live = plain.app.live()
    assert not live.web and live.proxy == '' and plain.served == {}
    assert env_of(plain, 'blog--2') == ''

@each('own', 'job proxy')
def test_domains_that_an_app_says_itself_are_not_taken_from_its_config(plain, own):
    plain.lives(FILES if own == 'job' else an_app('one', 'EXPOSE 8000', PUSHED))
    before = plain.whole()
    assert 'the server_name of its own nginx-proxy.conf' in refusal(
        dh.cmd_config, plain.app, 'domains=a.org')
    assert refusal(dh.cmd_config, plain.app, 'trust=10.0.0.1') == (
        'whom blog trusts stands in its own nginx-proxy.conf')
    assert plain.changed(before) == []
    dh.cmd_config(plain.app, 'timeout=9')

def test_a_front_is_trusted_from_a_change_of_config_to_the_next(plain):
    plain.lives(ONE_WEB)
    dh.cmd_config(plain.app, 'trust=10.0.0.0/8')
    assert '\n    10.0.0.0/8 1;\n' in plain.served[PROXY_FILE]
    assert env_of(plain, 'blog--2') == 'PORT=8000\n'
    dh.cmd_config(plain.app, 'trust', unset=True)
    assert 'geo' not in plain.served[PROXY_FILE]
    dh.cmd_rollback(plain.app)
    assert '\n    10.0.0.0/8 1;\n' in plain.served[PROXY_FILE]

def test_the_proxy_file_of_an_older_version_goes_on_and_is_nobodys_change(plain):
    live = plain.lives(ONE_WEB)
    older = live._replace(proxy=live.proxy.replace('    server_tokens off;\n', ''))
    plain.app.save(older)
    plain.host.nginx.restore('blog', older.proxy)
    before = plain.whole()
    dh.cmd_recover(plain.host)
    dh.cmd_stop(plain.app)
    dh.cmd_start(plain.app)
    assert plain.changed(before) == []
    plain.push(TWO_WEB)
    assert plain.served == {PROXY_FILE: plain_proxy(2)}
    dh.cmd_rollback(plain.app)
    assert plain.served == {PROXY_FILE: older.proxy}

LOGS = '/var/log/nginx'

def logs_of(machine):
    return sorted(os.listdir(machine.host.path(LOGS)))

def test_the_requests_to_an_app_are_noted_in_a_log_of_its_own(plain):
    plain.lives(ONE_WEB)
    assert logs_of(plain) == ['blog.log']
    plain.push(TWO_WEB)
    for name in ('blog.log.1', 'blog.log.2.gz', 'blog.log-20260102.gz', 'blog-x.log',
                 'blog.log.log', 'blogs.log', 'access.log', 'blog.log.1.log'):
        plain.write(LOGS + '/' + name, 'x')
    dh.cmd_destroy(plain.app, force=True)
    assert logs_of(plain) == ['access.log', 'blog-x.log', 'blog.log.1.log',
                              'blog.log.log', 'blogs.log']

def test_a_log_that_a_pushed_file_names_goes_with_the_app_and_one_of_others_stays(plain):
    plain.nginx()
    text = PUSHED.replace('{', '{\n access_log %s/blog-a.log; error_log %s/blog.log;' % (
        LOGS, LOGS), 1)
    plain.lives(an_app('one', 'EXPOSE 8000', text))
    plain.write('/etc/nginx/conf.d/own.conf', 'server { access_log %s/blog.log; }\n' % LOGS)
    plain.write(LOGS + '/blog-a.log', 'x')
    plain.write(LOGS + '/blog.log.1', 'x')
    dh.cmd_destroy(plain.app, force=True)
    assert logs_of(plain) == ['blog.log', 'blog.log.1']

@pytest.mark.parametrize('app, has_folder, path', [
    ('blog', True, '/var/log/nginx/blog.log'), ('blog', False, ''), ('access', True, ''),
    ('error', True, '')])
def test_no_log_takes_the_name_of_nginxs_own_or_a_folder_that_is_not_there(
        plain, app, has_folder, path):
    if not has_folder:
        os.rmdir(plain.host.path(LOGS))
    assert dh.log_path(plain.host, app) == path

def test_a_first_push_that_is_put_back_leaves_no_log(plain):
    plain.nginx()
    plain.broken['docker start'] = 9
    refusal(lambda: plain.push(ONE_WEB, old=ZERO, new=SHA))
    assert logs_of(plain) == []

def test_a_pushed_proxy_file_stays_when_the_config_changes(plain):
    plain.lives(an_app('one', 'EXPOSE 9000', PUSHED))
    dh.cmd_config(plain.app, 'A=1')
    text = plain.read('/etc/nginx/conf.d/blog.conf')
    assert text.startswith(PROXY_HEADER + PUSHED) and 'server 10.86.0.3:9000;' in text

def test_changes_of_config_do_not_pile_up_releases(plain):
    plain.lives(ONE_WEB)
    for number in range(2, 7):
        new = plain.release(number, SHA, ONE_WEB, 1.5)
        dh.Containers(plain.app).prepare(new)
    dh.cmd_config(plain.app, 'A=1')
    kept = [each.number for each in plain.app.kept()]
    assert kept == [7, 1]
    assert sorted(plain.containers) == ['blog--1', 'blog--7']

def test_a_job_app_finds_its_config_as_a_file(machine):
    path = '/var/lib/dockhand/apps/blog/env'
    job = 'start on x\nexec docker run --rm --env-file=%s blog\n' % path
    machine.lives(but('job', job), A='1')
    dh.cmd_config(machine.app, 'A=2', 'B=a "b" #c')
    if machine.init == 'upstart':
        assert machine.files()[path][1] == '600'
        assert without_commit(machine.read(path)) == 'A=2\nB=a "b" #c\n'
        assert machine.done[-1] == 'timeout 60 start blog'
    else:
        assert env_of(machine, 'blog--2') == 'A=2\nB=a "b" #c\n'
    dh.cmd_rollback(machine.app)
    if machine.init == 'upstart':
        assert without_commit(machine.read(path)) == 'A=1\n'
    else:
        assert env_of(machine, 'blog--1') == 'A=1\n'
    assert machine.app.config() == {'A': '1'}

def test_config_says_which_branch_is_deployed(plain):
    plain.lives(ONE_WEB)
    dh.cmd_config(plain.app, 'branch=live/x')
    assert plain.app.live().branch == 'live/x'
    assert plain.refs['refs/heads/live/x'] == SHA
    assert 'only live/x is deployed' in refusal(plain.push, TWO_WEB)
    plain.push(TWO_WEB, 'refs/heads/live/x')
    assert plain.running() == ['sha256:FROMtwo']

# ---- Commands: destroy -----------------------------------------------------------------

def test_removing_an_app_leaves_nothing_of_it(machine):
    machine.lives(FILES)
    machine.write('/home/git/blog.git/config', '')
    assert 'dockhand destroy blog --force' in refusal(dh.cmd_destroy, machine.app)
    assert machine.running() == ['sha256:FROMone']
    dh.cmd_destroy(machine.app, force=True)
    assert machine.images == machine.containers == machine.jobs == machine.served == {}
    assert not [path for path in machine.files() if 'blog' in path]
    assert 'no app blog here' in refusal(dh.cmd_destroy, machine.app, True)

@pytest.mark.parametrize('volumes', [False, True])
def test_a_plain_app_is_removed_with_its_data_on_request_only(plain, capfd, volumes):
    plain.lives(ONE_DATA)
    plain.write('/home/git/blog.git/config', '')
    plain.volumes += ['wiki--data', 'blogs--x']
    plain.push(TWO_DATA)
    capfd.readouterr()
    dh.cmd_destroy(plain.app, force=True, volumes=volumes)
    assert plain.images == plain.containers == plain.served == plain.networks == {}
    assert not [path for path in plain.files() if 'blog' in path]
    assert plain.volumes == ['blog--data'] * (not volumes) + ['wiki--data', 'blogs--x']
    assert capfd.readouterr().out == 'blog is removed\n%s blog--data\n' % (
        'removed volume' if volumes else 'kept: docker volume rm')

def test_a_network_that_another_app_uses_stays(plain):
    plain.lives(ONE_WEB)
    wiki, live = dh.App(plain.host, 'wiki'), release(app='wiki')
    wiki.save(live)
    wiki.set_link('live', live)
    dh.cmd_destroy(plain.app, force=True)
    assert list(plain.networks) == ['dockhand']

def test_a_network_that_was_made_by_hand_stays(plain):
    plain.docker_network('network', 'create', '--subnet=10.99.0.0/16', 'dockhand')
    plain.lives(ONE_WEB)
    dh.cmd_destroy(plain.app, force=True)
    assert list(plain.networks) == ['dockhand'] and plain.containers == {}

@pytest.mark.parametrize('running', [False, True])
def test_a_network_in_which_somebody_has_a_container_stays(plain, running):
    """Docker itself refuses to remove it only while that runs."""
    plain.lives(ONE_WEB)
    there = plain.containers['other'] = plain.container('other', 'sha256:other')
    there.update(network=plain.networks['dockhand']['Id'], Name='/other')
    there['State']['Running'] = running
    dh.cmd_destroy(plain.app, force=True)
    assert list(plain.networks) == ['dockhand']
    del plain.containers['other']

def test_a_network_stays_where_docker_cannot_say_who_is_in_it(plain):
    plain.lives(ONE_WEB)
    plain.broken['docker ps -aq --filter'] = 1
    dh.cmd_destroy(plain.app, force=True)
    assert list(plain.networks) == ['dockhand']

class Terminal(io.StringIO):
    def isatty(self):
        return True

@pytest.mark.parametrize('typed, removed', [
    (u'blog\n', True), (u'wiki\n', False), (u'', False), (u'y\n', False)])
def test_on_a_terminal_an_app_is_removed_once_its_name_is_typed(
        plain, capfd, typed, removed):
    plain.lives(ONE_WEB)
    kept, sys.stdin = sys.stdin, Terminal(typed)
    try:
        if removed:
            dh.cmd_destroy(plain.app)
        else:
            assert 'if you are sure: dockhand destroy blog --force' in refusal(
                dh.cmd_destroy, plain.app)
    finally:
        sys.stdin = kept
    assert 'Type its name again' in capfd.readouterr().out
    assert plain.running() == ([] if removed else ['sha256:FROMone'])

def test_config_of_an_app_that_never_came_can_be_removed(plain):
    dh.cmd_config(plain.app, 'A=1')
    dh.cmd_destroy(plain.app, force=True)
    assert not [path for path in plain.files() if 'blog' in path]

# ---- Commands: doctor ------------------------------------------------------------------

def test_doctor_asks_nginx_for_every_app(plain, capfd):
    plain.lives(dict(FILES, **{'nginx-proxy.conf': WEB}))
    dh.cmd_install(plain.host)
    plain.answers = {'blog.example.org': '502'}
    assert refusal(dh.cmd_doctor, plain.host)
    assert 'WRONG  blog answers 502 through nginx' in capfd.readouterr().out
    plain.answers = {'blog.example.org': '403'}         # its own file may say so
    dh.cmd_doctor(plain.host)

def test_doctor_names_what_it_cannot_read_of_the_servers_own_files(plain, capfd):
    plain.lives(FILES)
    dh.cmd_install(plain.host)
    plain.write('/etc/nginx/sites-enabled/old',
                'server {\n  include snippets/x.conf;\n}\n')
    dh.cmd_doctor(plain.host)
    assert ('note: /etc/nginx/sites-enabled/old:2: `include`: it is not read here: '
            'copy its lines: what it names may clash with an app unnoticed\n'
            ) in capfd.readouterr().out

@pytest.fixture
def healthy(machine, capfd):
    dh.cmd_install(machine.host)
    upload(machine, LINE, 'anna')
    machine.lives(FILES)
    capfd.readouterr()
    return machine

def test_doctor_finds_nothing_on_a_healthy_machine(healthy, capfd):
    before = healthy.whole()
    dh.cmd_doctor(healthy.host)
    assert capfd.readouterr().out == 'all is well\n' and healthy.changed(before) == []

def edited(path, text='broken'):
    return lambda machine: machine.write(path, text)

def says(command, text):
    return lambda machine: setattr(machine, command, lambda *words: text)

def broken(command):
    return lambda machine: machine.broken.update({command: 1})

def gone(path):
    return lambda machine: os.unlink(machine.host.path(path))

def pending(machine):
    os.symlink('releases/1', machine.app.folder('pending'))

def no_longer_run(path):
    return lambda machine: os.chmod(machine.host.path(path), 0o644)

def dead(machine):
    for each in (machine.containers, machine.jobs):
        each.clear()

@pytest.mark.parametrize('harm, what, command', [
    (says('which', ''), 'git', 'apt-get install git'),
    (edited('/etc/passwd', ''), 'there is no user git', 'dockhand.py install'),
    (edited('/etc/sudoers.d/dockhand'), 'sudoers.d/dockhand is not as', 'install'),
    (edited('/usr/local/bin/dockhand'), 'bin/dockhand is not as installed', 'install'),
    (broken('sudo -n'), 'the user git cannot run', 'visudo'),
    (says('sshd', 'AllowUsers admin\n'), 'AllowUsers of sshd is admin, without git',
     'sshd'),
    (says('sshd', 'AllowUsers git2 legit\n'), 'is git2 legit, without git',
     'sshd_config'),
    (says('sshd', 'allowgroups a\n'), 'AllowGroups of sshd is a, without git',
     'sshd_config'),
    (says('sshd', 'authorizedkeysfile /k\n'), 'sshd is /k, without .ssh/authorized_keys',
     'sshd_config'),
    (gone(KEYS_FILE), 'no key may push', 'dockhand upload-key NAME'),
    (edited(KEYS_FILE, keys_text()), 'no key may push', 'upload'),
    (no_longer_run(TEMPLATE + '/hooks/update'), 'hooks/update is not as', 'install'),
    (edited('/etc/nginx/conf.d/000-dockhand.conf'), '000-dockhand.conf', 'install'),
    (broken('nginx -t'), 'broken on purpose', 'nginx -t'),
    (gone('/run/nginx.pid'), 'nginx does not run', 'service nginx start'),
    (pending, 'a deploy of blog was interrupted', 'sudo dockhand recover'),
    (lambda m: m.images.pop('blog:1'), 'the image of blog is gone', 'rebuild blog'),
    (dead, 'blog does not run', 'sudo dockhand start blog')])
def test_doctor_says_what_is_wrong_and_what_to_type(healthy, capfd, harm, what, command):
    harm(healthy)
    assert 'thing(s) to mend' in refusal(dh.cmd_doctor, healthy.host)
    rows = re.findall('WRONG  (.*)\n +type: (.*)', capfd.readouterr().out)
    assert [row for row in rows if what in row[0] and command in row[1]]

@pytest.mark.parametrize('said', [
    'AllowUsers admin git', 'AllowGroups git wheel', 'allowusers a\nallowusers git',
    'AuthorizedKeysFile /k %h/.ssh/authorized_keys',
    'authorizedkeysfile /home/git/.ssh/authorized_keys'])
def test_doctor_finds_nothing_where_sshd_lets_git_in(healthy, capfd, said):
    healthy.sshd = lambda option: said + '\n'
    dh.cmd_doctor(healthy.host)
    assert capfd.readouterr().out == 'all is well\n'

def test_doctor_leaves_an_app_that_is_stopped_alone(healthy, capfd):
    dh.cmd_stop(healthy.app)
    dh.cmd_doctor(healthy.host)
    assert capfd.readouterr().out.endswith('all is well\n')

# ---- What a push costs -----------------------------------------------------------------

# What a push costs: every command it runs. In the order of the push, a line is a program
# with what it is told to do, one after the other. A line `x21` came 21 times: a wait.
COSTS = '''
a web app, first push
    x2      docker inspect
    nginx   -v
    git     cat-file, for-each-ref, ls-tree
    mkdir
    git     read-tree, checkout-index
    docker  build, inspect
    rm
    git     update-ref
    docker  network inspect
    x2      ip route
    docker  volume ls
    nginx   -t
    docker  create
    kill
    docker  start, rm, network create, create, start, tag, wait, update

a web app, handed over
    x2      docker inspect
    nginx   -v
    git     cat-file, for-each-ref, ls-tree
    mkdir
    git     read-tree, checkout-index
    docker  build, inspect
    rm
    git     update-ref
    nginx   -t
    docker  run
    kill
    docker  tag, wait, update
    nginx   -t
    kill
    docker  inspect
    ss
    docker  update, stop

a worker
    x2      docker inspect
    nginx   -v
    git     cat-file, for-each-ref, ls-tree
    mkdir
    git     read-tree, checkout-index
    docker  build, inspect
    rm
    git     update-ref
    docker  create, update, stop, start, tag
    x21     docker inspect
    docker  update, inspect

a service with a VOLUME
    x2      docker inspect
    nginx   -v
    git     cat-file, for-each-ref, ls-tree
    mkdir
    git     read-tree, checkout-index
    docker  build, inspect
    rm
    git     update-ref
    docker  create, update, stop, start, tag, wait, update, inspect

a job, where init is Upstart
    docker  inspect
    nginx   -v
    git     cat-file, for-each-ref, ls-tree
    mkdir
    git     read-tree, checkout-index
    nginx   -t
    docker  build, inspect
    rm
    git     update-ref
    stop
    docker  ps, tag
    kill
    start
    x21     status, docker ps, docker inspect

a job, elsewhere
    x2      docker inspect
    nginx   -v
    git     cat-file, for-each-ref, ls-tree
    mkdir
    git     read-tree, checkout-index
    nginx   -t
    docker  build, inspect
    rm
    git     update-ref
    docker  create, update, stop
    kill
    docker  start, tag
    x21     docker inspect
    docker  update

a web app, config changed
    x2      docker inspect
    nginx   -v
    docker  tag, inspect
    git     update-ref
    nginx   -t
    docker  run
    kill
    docker  tag, wait, update
    nginx   -t
    kill
    docker  inspect
    ss
    docker  update, stop
    git     cat-file, rev-list, update-ref

a web app, rolled back
    docker  inspect
    nginx   -t
    docker  start
    kill
    docker  tag, wait, update
    kill
    docker  inspect
    ss
    docker  update, stop
    git     cat-file, rev-list, update-ref
'''

COMMANDS_WITH_VERBS = ('docker', 'git', 'initctl', 'ip', 'nginx', 'systemctl')

class Recorder(Machine):
    """A Machine that notes each command it is given, those that only ask too."""
    def __init__(self, root, init):
        Machine.__init__(self, root, init)
        self.commands = []
        self.host.clock = StillClock()

    def __call__(self, argv, *args, **options):
        self.commands.append(name_and_verb(argv))
        return Machine.__call__(self, argv, *args, **options)

class StillClock(Clock):
    """Goes on only where dockhand waits, so that it asks as often at each run."""
    def __init__(self):
        self.now = 1e9

    def sleep(self, seconds):
        self.now += seconds

    def time(self):
        return self.now

    monotonic = time

def name_and_verb(argv):
    """`docker network create x` as (docker, network create); `rm -rf x` as (rm, '')."""
    words = argv[2:] if argv[0] == 'timeout' else argv
    name = words[0]
    if name not in COMMANDS_WITH_VERBS:
        return name, ''
    if name == 'nginx':
        return name, words[1]
    plain = [word for word in words[1:] if not word.startswith('-')]
    length = 2 if plain[0] in ('network', 'volume') else 1
    return name, ' '.join(plain[:length])

def cost_of(commands):
    """The lines of COSTS for [(name, verb)]."""
    cells = []
    while commands:
        length = max((1, 2, 3), key=lambda length: times_over(commands, length))
        count = times_over(commands, length)
        if count > 1:
            words = [' '.join(command).strip() for command in commands[:length]]
            cells.append(('x%d' % count, ', '.join(words)))
        else:
            cells.append(commands[0])
        commands = commands[count * length:]

    lines = []
    for name, those in itertools.groupby(cells, lambda cell: cell[0]):
        line = '%-8s%s' % (name, ', '.join(verb for _, verb in those))
        lines += textwrap.wrap(line.rstrip(), 84, subsequent_indent=' ' * 8)
    return ''.join('    %s\n' % line for line in lines)

def times_over(commands, length):
    """How often the first commands, so many, come one time after the other."""
    first = commands[:length]
    count = 1
    while commands[count * length:][:length] == first:
        count += 1
    return count

def expected_cost(kind):
    """What COSTS has under a title."""
    return re.findall('(?m)^%s\n((?:    .*\n)*)' % re.escape(kind), COSTS)[0]

ONE_WORKER, TWO_WORKER = an_app('one', ''), an_app('two', '')
ONE_SERVICE, TWO_SERVICE = [
    an_app(name, 'EXPOSE 5432\nVOLUME /data') for name in ('one', 'two')]

def one_setting(machine):
    dh.cmd_config(machine.app, 'A=1')

def way_back(machine):
    dh.cmd_rollback(machine.app)

@pytest.mark.parametrize('kind, init, before, act', [
    ('a web app, first push', 'none', [], ONE_WEB),
    ('a web app, handed over', 'none', [ONE_WEB], TWO_WEB),
    ('a worker', 'none', [ONE_WORKER], TWO_WORKER),
    ('a service with a VOLUME', 'none', [ONE_SERVICE], TWO_SERVICE),
    ('a job, where init is Upstart', 'upstart', [FILES], FILES_2),
    ('a job, elsewhere', 'systemd', [FILES], FILES_2),
    ('a job, elsewhere', 'none', [FILES], FILES_2),
    ('a web app, config changed', 'none', [ONE_WEB], one_setting),
    ('a web app, rolled back', 'none', [ONE_WEB, TWO_WEB], way_back)])
def test_a_push_runs_these_commands_in_this_order(tmpdir, kind, init, before, act):
    machine = Recorder(tmpdir, init)
    machine.nginx()
    for files in before[:1]:
        machine.lives(files)
    for files in before[1:]:
        machine.push(files)

    del machine.commands[:]
    if callable(act):
        act(machine)
    else:
        machine.push(act, **{} if before else {'old': ZERO, 'new': SHA})
    cost = cost_of(machine.commands)
    assert cost == expected_cost(kind), 'now COSTS is:\n\n%s\n%s' % (kind, cost)

# ---- Killed at any moment, the disk full at any write ----------------------------------

# What `.ci/moments.py` finds of each act; each Python tries a ninth of the moments.

def test_moments_are_explored_on_a_disk_with_room_or_not_at_all(tmpdir, monkeypatch):
    missing = str(tmpdir.join('missing'))
    assert folder_with_room([missing, str(tmpdir)], 1) == str(tmpdir)
    assert folder_with_room(['/proc', str(tmpdir)], 1) == str(tmpdir)
    monkeypatch.setenv('CI', '')
    with pytest.raises(pytest.skip.Exception) as skipped:
        folder_with_room([missing, str(tmpdir)], 10 ** 9)
    assert 'MB are free on none of %s, ' % missing in str(skipped.value)
    monkeypatch.setenv('CI', 'true')
    with pytest.raises(pytest.fail.Exception):
        folder_with_room([str(tmpdir)], 10 ** 9)

runs = pytest.mark.parametrize('act, init', RUNS)

@runs
def test_every_kind_of_effect_is_found(trials, act, init):
    kinds = set(what.split()[0] for _, what, _ in trials['kill', act, init])
    if act == 'https':
        assert kinds >= set('open flush fchmod rename mkdir timeout nginx'.split())
        return
    assert kinds >= set('open flush fchmod rename unlink symlink docker git'.split())
    # the proxy file of a job app is its own, and the same with another config
    assert ('nginx' in kinds) == (init != 'upstart job')
    assert act in ('rollback', 'config') or kinds >= set(['mkdir', 'open:', 'rmdir:'])
    assert init != 'upstart' or kinds >= set(['stop', 'timeout'][act == 'first':])
    assert len(trials['kill', act, init]) > 20

@runs
def test_a_kill_at_any_moment_leaves_one_whole_release_once_recovered(trials, act, init):
    assert wrong(trials, 'kill', act, init) == {}

@runs
def test_a_recover_that_is_killed_at_any_moment_is_done_by_the_next(trials, act, init):
    assert wrong(trials, 'second kill', act, init) == {}

@runs
def test_a_write_for_which_the_disk_is_full_leaves_one_whole_release(trials, act, init):
    assert wrong(trials, 'full', act, init) == {}

@runs
def test_a_disk_that_stays_full_leaves_a_whole_release_once_recovered(trials, act, init):
    assert wrong(trials, 'stays full', act, init) == {}

@pytest.mark.parametrize('act', ['stop', 'start'])
def test_a_stop_or_start_killed_at_any_moment_is_whole_once_recovered(tmpdir, act):
    """What is served is that of an app that runs, or of one that is stopped."""
    changes, _, states = explore(act, 'none web', str(tmpdir.mkdir('undisturbed')))
    kinds = set(what.split()[0] for _, what, _ in changes)
    assert kinds >= set(['open', 'rename', 'docker', 'nginx'])
    found = {}
    for number, at in enumerate(changes):
        machine = about_to(act, 'none web', str(tmpdir.mkdir(str(number))))
        kill(act, machine, at)
        dh.cmd_recover(machine.host)
        found[at] = differences(standing(machine), *states)
    assert dict((at, result) for at, result in found.items() if result) == {}

# ---- Moving: export, import, uninstall -------------------------------------------------

@pytest.fixture
def two(request, tmpdir):
    """A Machine with an app, whose volume holds something, and one that is fresh."""
    old = Machine(str(tmpdir.join('old')))
    with_data(old, ONE_DATA)
    return old, fresh_machine(str(tmpdir.join('new')), 'none')

def moved(old, new, *names):
    """What one exports the other imports."""
    exported(old, new.root + '.stream')
    imported(new, new.root + '.stream', *names)

def with_sum(data):
    return data + b'dockhand-sha256 %s\n' % dh.to_bytes(hashlib.sha256(data).hexdigest())

def rewritten(stream, path, **parts):
    """A stream as another one wrote it, whose sum is right. parts: a function of a text
    by the name of a part; one that gives None leaves it out"""
    import tarfile
    result = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(stream)) as source, tarfile.open(
            fileobj=result, mode='w', format=tarfile.GNU_FORMAT) as target:
        for part in source.getmembers():
            data = source.extractfile(part).read()
            if part.name in parts:
                data = parts[part.name](dh.to_text(data))
            if data is not None:
                dh.add_text(target, part.name, data)
        for name in sorted(set(parts) - set(source.getnames())):
            dh.add_text(target, name, parts[name](''))
    with open(path, 'wb') as file:
        file.write(with_sum(result.getvalue()))

@pytest.mark.parametrize('init', ['none', 'upstart', 'systemd'])
@pytest.mark.parametrize('files', [FILES, ONE_WEB, ONE_DATA, ONE_TYPES, ONE_CRON],
                         ids='job web data types cron'.split())
def test_an_app_is_moved_with_all_that_it_has(tmpdir, init, files):
    old = Machine(str(tmpdir.join('old')), init)
    with_data(old, files)
    old.refs['refs/tags/v1'] = SHA
    new = fresh_machine(str(tmpdir.join('new')), 'none')
    moved(old, new)
    there, here = old.app.live(), new.app.live()
    assert (here.commit, here.branch, here.config) == (SHA, 'main', there.config)
    assert (here.how, here.number) == ('import', 1)
    assert new.running() == old.running() and new.served.keys() == old.served.keys()
    assert new.refs == dict.fromkeys([MAIN, 'refs/tags/v1', 'refs/dockhand/1'], SHA)
    assert new.read('/var/lib/docker/volumes/blog--data/_data/kept') == 'of the old server'
    assert dh.list_folder(new.host.path(dh.STREAMS)) == []
    for machine in (old, new):
        assert dh.list_folder(machine.host.path(dh.STREAMS)) == []
        assert not {'exporting', 'importing'} & set(os.listdir(machine.app.folder()))

def test_an_app_is_down_while_its_volumes_are_copied_and_no_longer(two, capfd):
    old, new = two
    running = []
    tar = old.tar
    old.tar = lambda *words: running.append((words[-1], old.running())) or tar(*words)
    write = dh.SumWriter.write
    sent = []
    dh.SumWriter.write = lambda *args: sent.append(old.running()) or write(*args)
    try:
        exported(old, new.root + '.stream')
    finally:
        dh.SumWriter.write = write
    assert [state for word, state in running if word == '.'] == [[]]
    assert sent and set(map(tuple, sent)) == set([('sha256:FROMone',)])
    assert re.search('blog was down for [0-9.]+ s\n', capfd.readouterr().err)

def test_an_app_without_volumes_or_that_is_stopped_is_not_touched(tmpdir):
    old = Machine(str(tmpdir.join('old')))
    old.lives(ONE_WEB)
    exported(old, str(tmpdir.join('stream')))
    assert [line for line in old.done if line.startswith('docker')] == []

    old.volumes.append('blog--data')
    old.fill('blog--data', {'kept': 'x'})
    dh.cmd_stop(old.app)
    del old.done[:]
    exported(old, str(tmpdir.join('stream')))
    assert [line for line in old.done if line.startswith('docker')] == []
    assert old.running() == [] and old.app.is_stopped()

def test_an_app_that_was_stopped_is_so_where_it_comes(two):
    old, new = two
    dh.cmd_stop(old.app)
    moved(old, new)
    assert new.app.is_stopped() and new.running() == []
    dh.cmd_start(new.app)
    assert new.running() == ['sha256:FROMone']

def test_an_app_that_does_not_answer_after_its_copy_is_named(two):
    old, new = two
    old.containers['blog--1']['Image'] = old.images['blog:1']['Id'] = 'sha256:sickone'
    said = refusal(exported, old, new.root + '.stream')
    assert said.startswith('the stream is whole, but: blog does not answer since')
    imported(new, new.root + '.stream')
    assert new.running() == ['sha256:FROMone']

def an_app_beside(machine, name, **changes):
    """The record of another app, which answers nothing."""
    app, live = dh.App(machine.host, name), release(app=name, **changes)
    app.save(live)
    app.set_link('live', live)

def test_services_are_copied_last_and_come_first(plain):
    """A job that publishes a port is one, a worker is none."""
    an_app_beside(plain, 'shop', proxy='server {}')
    an_app_beside(plain, 'data', web=False)
    an_app_beside(plain, 'mail', job=JOB.replace('blog', '-p 25:25 mail'), port=0, web=False)
    an_app_beside(plain, 'worker', web=False, port=0)
    assert dh.in_moving_order(plain.host, ['data', 'mail', 'shop', 'worker']) == [
        'shop', 'worker', 'data', 'mail']

def test_a_volume_that_a_job_names_goes_along_and_a_folder_is_told_of(tmpdir, capfd):
    old = Machine(str(tmpdir.join('old')), 'upstart')
    job = JOB.replace('--rm', '--rm -v named:/x -v /srv/x:/y -v /etc/z:/z:ro')
    old.lives(dict(FILES, **{'upstart.conf': job}))
    old.write('/home/git/blog.git/config', '')
    old.volumes += ['named', 'other']
    old.fill('named', {'a': 'b'})
    new = fresh_machine(str(tmpdir.join('new')), 'upstart')
    moved(old, new)
    assert new.volumes == ['named'] and new.read(VOLUMES + '/named/_data/a') == 'b'
    notes = re.findall('Note: .* in the stream', capfd.readouterr().err)
    assert notes == ['Note: /srv/x, which blog writes to, is not in the stream']

def test_a_volume_that_is_a_device_is_told_of_and_never_copied_empty(two, capfd):
    old, new = two
    old.devices['blog--data'] = {'type': 'none', 'o': 'bind', 'device': '/mnt/x'}
    moved(old, new)
    assert 'Note: blog--data, which blog writes to, is not in the stream' in (
        capfd.readouterr().err)
    assert new.read('/var/lib/docker/volumes/blog--data/_data/kept') is None

def test_what_changes_while_it_is_copied_is_told_and_stops_nothing(two, capfd):
    old, new = two
    old.is_written_to = True
    exported(old, new.root + '.stream')
    assert 'Note: something wrote there meanwhile: tar: ./kept: file changed' in (
        capfd.readouterr().err)
    imported(new, new.root + '.stream')

def test_an_app_that_somebody_makes_meanwhile_is_left_alone(two):
    old, new = two
    exported(old, new.root + '.stream')
    certificates = dh.import_certificates
    dh.import_certificates = lambda host, *rest: new.lives(ONE_WEB)
    try:
        assert '1 app(s) did not come up' in refusal(imported, new, new.root + '.stream')
    finally:
        dh.import_certificates = certificates
    assert new.running() == ['sha256:FROMone'] and new.app.live().how == 'push'

def test_what_goes_on_writing_while_a_volume_is_copied_is_named(two, capfd):
    old, new = two
    run_one = old.container('run', 'sha256:FROMone')
    run_one.update(Name='/blog--1--cron-x', volumes=['blog--data'])
    run_one['State']['Running'] = True
    old.containers['blog--1--cron-x'], old.shares = run_one, True
    exported(old, new.root + '.stream')
    assert 'Note: blog--1--cron-x goes on, and may write to blog--data' in capfd.readouterr().err

def test_a_volume_that_two_apps_share_is_filled_once(tmpdir):
    old = Machine(str(tmpdir.join('old')), 'upstart')
    shared = JOB.replace('--rm', '--rm -v shared:/x')
    old.lives(dict(FILES, **{'upstart.conf': shared}))
    old.write('/home/git/blog.git/config', '')
    an_app_beside(old, 'wiki', job=shared.replace('blog', 'wiki'), port=0, web=False)
    old.write('/var/lib/dockhand/apps/wiki/stopped', '')
    old.volumes.append('shared')
    old.fill('shared', {'a': 'b'})
    new = fresh_machine(str(tmpdir.join('new')), 'upstart')
    new.commits[SHA] = FILES
    filled = []
    tar = new.tar
    new.tar = lambda *words: filled.append(words) or tar(*words)
    exported(old, new.root + '.stream')
    # the one that comes second has the same host name
    assert refusal(imported, new, new.root + '.stream') == '1 app(s) did not come up: blog'
    assert len([words for words in filled if '-xpf' in words]) == 1
    assert new.volumes == ['shared'] and new.read(VOLUMES + '/shared/_data/a') == 'b'

def test_a_shallow_repository_says_so_where_it_comes(two):
    old, new = two
    old.write('/home/git/blog.git/shallow', SHA + '\n')
    moved(old, new)
    assert new.read('/home/git/blog.git/shallow') == SHA + '\n'

def test_an_app_that_was_never_live_is_moved_as_it_is(two, capfd):
    old, new = two
    dh.cmd_config(dh.App(old.host, 'wiki'), 'A=1')
    moved(old, new)
    assert dh.App(new.host, 'wiki').config() == {'A': '1'}
    assert 'wiki waits for its first push\n' in capfd.readouterr().out
    assert sorted(dh.all_apps(new.host)) == ['blog', 'wiki']

def test_a_tar_from_before_attributes_does(two):
    old, new = two
    old.is_old = new.is_old = True
    moved(old, new)
    assert new.running() == ['sha256:FROMone']

# Keys

def line_of(name, blob, *words):
    return dh.make_key_line(Key('ssh-ed25519', blob, name, words)).text

def test_keys_come_along_but_for_those_that_are_there(two):
    old, new = two
    of_old = [line_of('anna', 'AAAA'), 'from="192.0.2.0/24",' + line_of('ben', 'AAAB')]
    old.write('/home/git/' + dh.KEYS, '\n'.join(of_old + ['ssh-rsa AAAX me', '']))
    moved(old, new)
    lines = new.read('/home/git/' + dh.KEYS).splitlines()
    assert [line for line in lines if line[0] != '#'] == of_old

def test_only_keys_that_reach_what_is_moved_come_along(two):
    old, new = two
    an_app_beside(old, 'wiki')
    old.write('/home/git/' + dh.KEYS, '\n'.join([
        line_of('ben', 'AAAB', 'blog'), line_of('cora', 'AAAC', 'wiki', '--read-only'),
        line_of('dan', 'AAAD', 'bl-'), line_of('eve', 'AAAE', 'blo-', '')[:-1] + 'e', '']))
    exported(old, new.root + '.stream', 'blog')
    imported(new, new.root + '.stream')
    assert [key.name for key in dh.read_keys(new.host)] == ['anna', 'ben']

def test_a_key_that_may_do_something_else_here_is_refused(two):
    old, new = two
    old.write('/home/git/' + dh.KEYS, line_of('anna', 'AAAB', 'blog') + '\n')
    before = new.files()
    assert 'the key "anna" is here already, and may do something else' in refusal(
        moved, old, new)
    assert new.files() == before
    imported(new, new.root + '.stream', 'blog')     # which takes no keys
    assert [key.blob for key in dh.read_keys(new.host)] == ['AAAA']

# Certificates

@pytest.fixture
def two_secured(two):
    """The same where the app has https for two names, for one of them by a certificate
    that somebody brought."""
    old, new = two
    dh.cmd_config(old.app, 'domains=here.org www.here.org')
    old.here = '192.0.2.2'
    dh.cmd_https(old.host, 'blog')
    assert old.ordered == ['here.org', 'www.here.org']
    old.write('/etc/letsencrypt/accounts/x/y/private_key.json', '{}')
    own = old.host.path(old.host.certificates.own_path('blog'))
    dh.make_folder(os.path.dirname(own), 0o700)
    dh.replace_file(own, pem('own.org', 'k9'), 0o600)
    return old, new

def test_certificates_come_with_what_renews_them(two_secured):
    old, new = two_secured
    moved(old, new)
    for path in ('/var/lib/dockhand/certificates/here.org.pem', dh.RENEWAL_HOOK,
                 '/etc/letsencrypt/renewal/dockhand-here.org.conf',
                 '/etc/letsencrypt/live/dockhand-www.here.org/privkey.pem',
                 '/etc/letsencrypt/accounts/x/y/private_key.json',
                 '/var/lib/dockhand/certificates/own/blog.pem',
                 '/var/lib/dockhand/apps/blog/https'):
        assert new.read(path) == old.read(path) is not None, path
    assert new.served['/etc/nginx/conf.d/blog.conf'].count('here.org.pem') == 4
    assert new.ordered == []
    assert mode_in(os.stat(new.host.path(dh.CERTIFICATES, 'here.org.pem'))) == '600'

def test_a_certificate_that_is_here_stays_and_accounts_too(two_secured):
    old, new = two_secured
    new.certbot_keep('dockhand-here.org', 'here.org')
    assert new.host.certificates.copy('here.org')
    new.write('/etc/letsencrypt/accounts/x/y/private_key.json', 'of here')
    moved(old, new)
    assert 'key=k0' in new.read('/var/lib/dockhand/certificates/here.org.pem')
    assert 'key=k1' in new.read('/var/lib/dockhand/certificates/www.here.org.pem')
    assert new.read('/etc/letsencrypt/accounts/x/y/private_key.json') == 'of here'
    assert 'k0' in new.read('/etc/letsencrypt/live/dockhand-here.org/privkey.pem')

def test_where_certbot_is_missing_it_is_said_who_will_not_renew(two_secured, capfd):
    old, new = two_secured
    new.has_certbot = False
    moved(old, new)
    assert 'Note: certbot is missing: apt-get install certbot' in capfd.readouterr().err

# What is refused

def check_refused(new, path, pattern, *names):
    """An import ends with one line, and changes nothing."""
    before, done = new.files(), list(new.done)
    said = refusal(imported, new, path, *names)
    assert re.search(pattern, said), said
    assert new.files() == before
    assert [line for line in new.done[len(done):] if not line.startswith('rm ')] == []

def test_a_stream_that_is_cut_or_changed_anywhere_changes_nothing(two):
    old, new = two
    whole = exported(old, new.root + '.stream')
    path = new.root + '.spoilt'
    places = random.Random(5)
    cuts = [0, 1, 511, 512, len(whole) - 1] + [places.randrange(len(whole))
                                               for _ in range(20)]
    flips = [0, len(whole) - 1, len(whole) - 2, len(whole) - 82] + [
        places.randrange(len(whole)) for _ in range(20)]
    spoilt = [whole[:at] for at in cuts]
    for at in flips:
        byte = bytearray(whole[at:at + 1])[0] ^ (1 << places.randrange(8))
        spoilt.append(whole[:at] + bytes(bytearray([byte])) + whole[at + 1:])
    spoilt += [whole + b'\n', whole * 2, b'x' * 200, with_sum(b'x' * 2000)]
    for data in spoilt:
        with open(path, 'wb') as file:
            file.write(data)
        check_refused(new, path, 'nothing came in|no whole stream|no tar|no dockhand.json')

APP_JSON = 'apps/blog/app.json'

def but_for(**changes):
    """A JSON text of a dict in which some values are others."""
    return lambda text: dh.to_json(dict(json.loads(text), **changes))

@pytest.mark.parametrize('pattern, parts', [
    ('of another dockhand, 7777', {'dockhand.json': but_for(format=2, version='7777')}),
    ('no dockhand.json', {'dockhand.json': lambda text: None}),
    ('dockhand.json .* cannot be read', {'dockhand.json': lambda text: '[]'}),
    ('dockhand.json .* cannot be read', {'dockhand.json': lambda text: '{'}),
    ('dockhand.json .* cannot be read', {'dockhand.json': but_for(apps='blog')}),
    ('no name for an app', {'dockhand.json': but_for(apps=['../x'])}),
    ('no name for an app', {'dockhand.json': but_for(apps=[['blog']])}),
    ('names an app twice', {'dockhand.json': but_for(apps=['blog', 'blog'])}),
    ('there is no apps/wiki/app.json', {'dockhand.json': but_for(apps=['blog', 'wiki'])}),
    ('and no such app', {'dockhand.json': but_for(apps=[])}),
    ('describes blog in another way', {APP_JSON: but_for(name='wiki')}),
    ('describes blog in another way', {APP_JSON: but_for(commit='x' * 40)}),
    ('describes blog in another way', {APP_JSON: but_for(commit=None)}),
    ('describes blog in another way', {APP_JSON: but_for(held=None)}),
    ('describes blog in another way', {APP_JSON: but_for(branch='-x')}),
    ('describes blog in another way', {APP_JSON: but_for(volumes=['../../etc'])}),
    ('describes blog in another way', {APP_JSON: but_for(volumes=[1, '-v'])}),
    ('describes blog in another way', {APP_JSON: but_for(names=['../x.pem'])}),
    ('describes blog in another way', {APP_JSON: but_for(stopped='no')}),
    ('describes blog in another way', {APP_JSON: but_for(config={'A': 1})}),
    ('describes blog in another way', {APP_JSON: but_for(more=1)}),
    ('describes blog in another way', {APP_JSON: lambda text: '{}'}),
    ('there is no apps/blog/volume-blog--data.tar',
     {'apps/blog/volume-blog--data.tar': lambda text: None}),
    ('no export writes ../../etc/passwd', {'../../etc/passwd': lambda text: 'x'}),
    ('no export writes /etc/passwd', {'/etc/passwd': lambda text: 'x'}),
    ('no export writes apps/blog/x', {'apps/blog/x': lambda text: 'x'}),
    ('no key of dockhand', {'keys': lambda text: 'ssh-rsa AAAX me\n'}),
    ('no key of dockhand', {'keys': lambda text: 'x\n' + text}),
    ('there is no keys', {'keys': lambda text: None}),
    ('is no right', {'keys': lambda text: text.replace('serve anna', 'serve anna UP')})])
def test_what_no_export_writes_is_refused_though_its_sum_is_right(two, pattern, parts):
    old, new = two
    path = new.root + '.stream'
    rewritten(exported(old, path), path, **parts)
    check_refused(new, path, pattern)

@pytest.mark.parametrize('kind', ['SYMTYPE', 'LNKTYPE', 'DIRTYPE', 'FIFOTYPE'])
def test_what_is_no_plain_file_is_refused(two, kind):
    import tarfile
    old, new = two
    result = io.BytesIO()
    with tarfile.open(fileobj=result, mode='w', format=tarfile.GNU_FORMAT) as target:
        part = tarfile.TarInfo('keys')
        part.type, part.linkname = getattr(tarfile, kind), '/etc/passwd'
        target.addfile(part)
    with open(new.root + '.stream', 'wb') as file:
        file.write(with_sum(result.getvalue()))
    check_refused(new, new.root + '.stream', 'no export writes keys')

def test_each_name_that_is_here_already_is_named(two, capfd):
    old, new = two
    dh.cmd_config(dh.App(old.host, 'wiki'), 'A=1')
    an_app_beside(old, 'shop')
    dh.cmd_config(dh.App(new.host, 'wiki'), 'A=2')
    new.volumes.append('blog--data')
    new.images['shop:latest'] = image('FROM somebody')
    new.write('/etc/systemd/system/shop.service', 'x')
    exported(old, new.root + '.stream')
    capfd.readouterr()
    check_refused(new, new.root + '.stream', '4 thing.s. in the way')
    told = capfd.readouterr().err
    for text in ('the app wiki is here already', 'the volume blog--data is here already',
                 'docker has an image shop:latest already', 'shop.service is on this'):
        assert text in told

def test_one_app_of_a_backup_is_taken_alone(two):
    old, new = two
    dh.cmd_config(dh.App(old.host, 'wiki'), 'A=1')
    exported(old, new.root + '.stream')
    check_refused(new, new.root + '.stream', 'the stream has no shop, but wiki blog|'
                  'the stream has no shop, but blog wiki', 'shop')
    imported(new, new.root + '.stream', 'wiki')
    assert dh.all_apps(new.host) == ['wiki']

def test_where_there_is_no_room_nothing_is_stopped_and_nothing_comes(two, monkeypatch):
    old, new = two
    exported(old, new.root + '.stream')
    monkeypatch.setattr(dh, 'free_bytes', lambda host, path: dh.SPACE * 1000000)
    del old.done[:]
    assert 'the copy of the volumes of blog wants' in refusal(
        exported, old, new.root + '.other')
    assert [line for line in old.done if line.startswith('docker')] == []
    check_refused(new, new.root + '.stream', 'what comes in wants .* beside the 512 MB')

def test_what_is_exported_is_asked_for_by_name_and_not_shown(two, monkeypatch):
    old, new = two
    assert 'no app shop here' in refusal(dh.cmd_export, old.host, 'blog', 'shop')
    assert 'no name for an app' in refusal(dh.cmd_export, old.host, '../x')
    monkeypatch.setattr(os, 'isatty', lambda fd: True)
    assert 'a terminal cannot show this' in refusal(dh.cmd_export, old.host)
    assert 'a stream is wanted' in refusal(dh.cmd_import, new.host)

@table('status, said, bytes', """
    0 => 8\\t/x\\n => 8192
    1 => 12\\t/x\\n => 12288""")
def test_files_that_go_while_they_are_counted_stop_no_export(plain, status, said, bytes):
    plain.du = lambda *words: Result(int(status), said, "du: cannot access '/x/a': No such\n")
    assert dh.folder_bytes(plain.host, '/x') == int(bytes)

def test_a_du_that_says_nothing_is_an_error(plain):
    for result in (Result(1, '', 'du: /x: No such file\n'), Result(0, '', '')):
        plain.du = lambda *words: result
        assert re.search('du -skx -- /x failed|du says nothing of /x', refusal(
            dh.folder_bytes, plain.host, '/x'))

def test_what_cannot_be_swept_keeps_no_app_down(plain):
    plain.lives(ONE_WEB)
    plain.write(dh.STREAMS + '/1-999/stream', 'x')
    plain.broken['rm -rf -- %s/1-999' % dh.STREAMS] = 1
    plain.containers['blog--1']['State'].update(Running=False)
    dh.cmd_recover(plain.host)
    assert plain.running() == ['sha256:FROMone']

@pytest.mark.parametrize('command', ['tar', 'docker stop', 'git --git-dir'])
def test_an_export_that_fails_leaves_the_app_running(two, command):
    old, new = two
    old.broken[command] = 1
    if command == 'tar':                    # 1 is its word for what changed meanwhile
        old.broken.clear()
        old.tar = lambda *words: Result(2 * ('-cf' in words), '', 'tar: Cannot open\n')
    assert 'failed' in refusal(exported, old, new.root + '.stream')
    assert old.running() == ['sha256:FROMone']
    assert not os.path.exists(old.app.folder('exporting'))
    assert old.containers['blog--1']['policy'] == 'always'

def test_what_tarfile_writes_after_an_export_has_failed_goes_nowhere(capfd):
    """It does so whenever it is collected."""
    with pytest.raises(Failure):
        with dh.SumWriter() as writer:
            writer.write(b'begun')
            raise Failure('x')
    writer.write(b'and its end')
    assert capfd.readouterr().out == 'begun'

def test_a_volume_that_docker_makes_elsewhere_is_refused_and_goes_again(two, capfd):
    old, new = two
    exported(old, new.root + '.stream')
    new.devices['blog--data'] = {'device': ':/nfs'}
    assert refusal(imported, new, new.root + '.stream') == '1 app(s) did not come up: blog'
    assert 'blog was not brought here: docker makes the volume' in capfd.readouterr().out
    assert new.volumes == [] and dh.all_apps(new.host) == []

# What does not come up

def test_an_app_that_does_not_come_up_is_named_and_the_others_stay(two, capfd):
    old, new = two
    dh.cmd_config(dh.App(old.host, 'wiki'), 'A=1')
    exported(old, new.root + '.stream')
    new.broken['docker build'] = 2
    capfd.readouterr()
    assert refusal(imported, new, new.root + '.stream') == '1 app(s) did not come up: blog'
    said = capfd.readouterr().out
    assert 'blog did not come up: the build failed' in said
    assert 'sudo dockhand rebuild blog' in said
    assert dh.all_apps(new.host) == ['blog', 'wiki'] and new.running() == []
    assert new.read(VOLUMES + '/blog--data/_data/kept') == 'of the old server'
    assert new.app.config() == {'A': '1'} and new.refs[MAIN] == SHA
    dh.cmd_recover(new.host)
    dh.cmd_rebuild(new.app)
    assert new.running() == ['sha256:FROMone'] and new.app.live().how == 'rebuild'

def test_an_app_that_wants_another_one_is_tried_again_once_that_runs(two):
    old, new = two
    dh.cmd_config(dh.App(old.host, 'wiki'), 'A=1')      # comes first, by the alphabet
    exported(old, new.root + '.stream')
    new.broken['docker build'] = 1
    imported(new, new.root + '.stream')
    assert new.running() == ['sha256:FROMone']

@pytest.mark.parametrize('command', [
    'docker volume create', 'tar', 'git --git-dir=/home/git/blog.git fetch'])
def test_an_app_that_cannot_be_brought_leaves_nothing_of_it(two, command):
    old, new = two
    exported(old, new.root + '.stream')
    before = new.files()
    new.broken[command] = 2
    assert refusal(imported, new, new.root + '.stream') == '1 app(s) did not come up: blog'
    assert new.files() == before and new.volumes == []

def test_what_never_came_is_not_rebuilt(plain):
    assert 'no app blog is live here' in refusal(dh.cmd_rebuild, plain.app)
    plain.write('/home/git/blog.git/config', '')
    assert 'no app blog is live here' in refusal(dh.cmd_rebuild, plain.app)

# Killed at any moment

def whole(machine):
    return dict(standing(machine), volumes=str(sorted(machine.volumes)),
                marks=str([name for name in ('exporting', 'importing')
                           if os.path.exists(machine.app.folder(name))]))

def after_a_killed_move(act, init, states, at, folder):
    machine = about_to(act, init, folder)
    kill(act, machine, at)
    dh.cmd_recover(machine.host)
    found = differences(whole(machine), *states)
    if act == 'import' and machine.app.live() is None:
        imported(machine, machine.root + '.stream')
        found += differences(whole(machine), states[-1])
    return found

@pytest.mark.parametrize('act, init', [
    (act, init) for act in ('export', 'import') for init in ('none data', 'upstart job')])
def test_a_move_killed_at_any_moment_is_whole_once_recovered(request, tmpdir, act, init):
    """Each of nine Pythons tries another ninth of the moments."""
    machine = about_to(act, init, str(tmpdir.mkdir('undisturbed')))
    states = [whole(machine)]
    changes, _ = moments_of(act, machine)
    states.append(whole(machine))
    assert act == 'import' or differences(states[0], states[1]) == []
    kinds = set(what.split()[0] for _, what, _ in changes)
    assert kinds >= set('open rename docker tar'.split())

    parts = 1 if request.config.option.markexpr else 9
    now = changes[(sys.version_info[1] + 7 * dh.PYTHON_2) % parts::parts]
    tasks = [functools.partial(after_a_killed_move, act, init, states, at) for at in now]
    came = in_parallel(tasks, str(tmpdir.join('tried')))
    assert dict((at, found) for at, found in zip(now, came) if found) == {}

def test_what_a_killed_export_left_on_the_disk_is_swept(plain):
    mine = dh.own_mark(Host()).replace(' ', '-')
    for name in ('1-999', mine, 'x'):
        plain.write('%s/%s/stream' % (dh.STREAMS, name), 'x')
    pid, _, began = mine.partition('-')
    plain.write('/proc/%s/stat' % pid, '%s (x) S %s' % (pid, '1 ' * 18 + began))
    dh.cmd_recover(plain.host)
    assert dh.list_folder(plain.host.path(dh.STREAMS)) == [mine]

# Uninstall

@pytest.mark.parametrize('init', ['none', 'upstart', 'systemd', 'scripts'])
def test_uninstall_removes_dockhand_and_nothing_else(tmpdir, capfd, init):
    machine = Machine(tmpdir, init.replace('scripts', 'none'))
    if init == 'scripts':
        machine.write('/usr/sbin/update-rc.d', '')
        machine.write('/etc/init.d/x', '')
    machine.lives(ONE_CRON)
    before = machine.files()
    dh.cmd_install(machine.host)
    installed = machine.files()
    assert [path for path in installed if 'recover' in path] or init == 'none'
    capfd.readouterr()
    dh.cmd_uninstall(machine.host)
    now = machine.files()
    lost = [path for path in installed if path not in now]
    assert sorted(path for path in lost if not path.startswith(dh.LIBRARY)) == sorted(
        path for path in installed if 'recover' in path or path in (
            dh.PROGRAM, dh.OLDER_NAME, dh.SUDOERS))
    assert machine.wanted == []
    assert dh.LIBRARY not in now and machine.running() == ['sha256:FROMone']
    said = capfd.readouterr().out
    for text in ('removed ' + dh.LIBRARY, '/etc/cron.d/dockhand-APP', 'userdel -r git',
                 'docker volume rm', '`python3 dockhand.py install` finds all of it again'):
        assert text in said
    assert ('/etc/init/APP.conf' in said) == ('/etc/init' in before)

    dh.cmd_install(machine.host)
    again = machine.files()
    changed = set(path for path in set(again) | set(installed)
                  if again.get(path) != installed.get(path))
    changed = set(path for path in changed if not re.search('pycache|[.]pyc', path))
    assert changed <= set([dh.TOKEN_FILE, dh.CATCH_ALL, dh.KEPT_USER])
    assert machine.running() == ['sha256:FROMone'] and machine.app.live().number == 1

def test_doctor_wants_certbots_hook_only_where_certbot_renews_something(plain):
    plain.lives(ONE_WEB)
    plain.write('/etc/letsencrypt/cli.ini', '')
    dh.make_folder(plain.host.path(dh.CERTIFICATES), 0o700)
    paths = [part.path for part in dh.installed_parts(plain.host)]
    assert dh.RENEWAL_HOOK not in paths
    plain.write('/etc/letsencrypt/renewal/dockhand-x.org.conf', '')
    paths = [part.path for part in dh.installed_parts(plain.host)]
    assert dh.RENEWAL_HOOK in paths

def test_uninstall_keeps_the_name_of_another_user(plain):
    plain.write('/etc/passwd', 'ops:x:%d:%d::/home/git:/bin/sh\n' % (USER, GROUP))
    plain.host.user = 'ops'
    dh.cmd_install(plain.host, 'ops')
    dh.cmd_uninstall(plain.host)
    assert dh.installed_user(plain.host) == 'ops'

def test_uninstall_removes_nothing_where_an_app_cannot_be_put_right(plain):
    plain.lives(ONE_WEB)
    dh.cmd_install(plain.host)
    before = plain.files()
    plain.images.clear()
    assert 'nothing is removed' in refusal(dh.cmd_uninstall, plain.host)
    assert plain.files() == before

def test_an_uninstall_that_was_killed_is_done_by_the_next(plain):
    dh.cmd_install(plain.host)
    plain.broken['rm -rf -- /usr/local/lib/dockhand'] = 1
    refusal(dh.cmd_uninstall, plain.host)
    dh.cmd_uninstall(plain.host)
    dh.cmd_uninstall(plain.host)
    assert plain.read(dh.PROGRAM) is None and dh.LIBRARY not in plain.files()

# ---- configure-system.sh, a function at a time -----------------------------------------

def in_script(folder, lines, **stand_ins):
    """Run lines after the functions of configure-system.sh, where `main` is called; an
    (exit status, stdout, stderr). stand_ins: {command: the shell lines that it is}"""
    for name, text in dict({'apt_get': 'exit 1'}, **stand_ins).items():
        path = folder.join(name.replace('_', '-'))
        path.write('#!/bin/sh\n%s\n' % text)
        path.chmod(0o755)
    with open(os.path.join(HERE, 'configure-system.sh')) as script:
        functions, call, rest = script.read().partition('\nmain "$@"\n')
    assert call and not rest

    lines = '\nWORK=%s\nlook_around\n%s\n' % (folder, lines)
    process = subprocess.Popen(
        ['sh', '-c', functions + lines, 'configure-system.sh'], cwd=str(folder),
        env=dict(os.environ, PATH='%s:%s' % (folder, os.environ['PATH'])),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    return process.returncode, dh.to_text(out), dh.to_text(err)

# A machine that has all but these two, which not everybody wants
BARE = '''
have() { [ "$1" != ssh ] && [ "$1" != avahi-daemon ]; }
engine_present() { :; }
%s
missing_packages
'''

@table('asked, packages', '''
    INIT=systemd                         =>
    INIT=systemd DEMO=yes                => openssh-client
    INIT=systemd LOCAL_NAME=yes          => avahi-daemon
    INIT=none LOCAL_NAME=yes             =>
    INIT=upstart LOCAL_NAME=yes DEMO=yes => openssh-client avahi-daemon''')
def test_what_one_option_alone_wants_is_installed_with_that_option(
        tmpdir, asked, packages):
    status, out, err = in_script(tmpdir, BARE % asked)
    assert (status, err) == (0, '')
    wanted = [name for name in out.split() if name in ('openssh-client', 'avahi-daemon')]
    assert wanted == packages.split()

@table('there, wanted', '''
               => cron
    cron       =>
    crond      =>
    cron crond =>''')
def test_cron_is_installed_where_there_is_none(tmpdir, there, wanted):
    lines = '''
have() { case $1 in cron | crond) case " %s " in *" $1 "*) ;; *) return 1 ;; esac ;; esac; }
engine_present() { :; }
missing_packages''' % there
    status, out, err = in_script(tmpdir, lines)
    assert (status, err) == (0, '')
    assert [name for name in out.split() if name == 'cron'] == wanted.split()

@table('starts, said', '''
    0 =>
    1 => note: cron does not run, crontabs of apps will not''')
def test_a_cron_that_does_not_start_is_told_and_stops_nothing(tmpdir, starts, said):
    lines = '''
have() { :; }
note() { echo "note: $*"; }
ensure_up() { return %s; }
ensure_cron''' % starts
    status, out, err = in_script(tmpdir, lines)
    assert (status, err) == (0, '') and out.startswith(said) and bool(out) == bool(said)

@table('options, name, demo', '''
                        =>     =>
    --local-name        => yes =>
    --demo --local-name => yes => yes
    --demo              =>     => yes''')
def test_a_name_for_the_neighbours_is_an_option(tmpdir, options, name, demo):
    status, out, _ = in_script(tmpdir, 'parse_options %s; echo "$LOCAL_NAME/$DEMO"' % options)
    assert (status, out) == (0, '%s/%s\n' % (name, demo))

APT_GET = """case "$*" in *update*) cat <<'SAID'
Reading package lists...
%s
SAID
    ;; *) echo 'E: Unable to locate package nginx'; exit 100 ;; esac"""

@table('release, update, hint', '''
    U => W: Failed to fetch http://archive.ubuntu.com/x/Packages  404  Not Found => ubuntu
    U => E: Some index files failed to download. They have been ignored          =>
    D => E: The repository 'http://deb.debian.org/debian b Release' does not have a \
Release file. => archive.debian
    D => E: The repository 'http://deb.debian.org/debian b Release' no longer has a \
Release file. => archive.debian
    D => E: The repository 'http://deb.debian.org/debian sid InRelease' is not signed. =>
    D => W: Failed to fetch http://deb.debian.org/x  Could not resolve 'deb.debian.org' =>
    U => W: Failed to fetch http://ppa.launchpad.net/x/Packages  404  Not Found  =>
    D => Hit:1 http://deb.debian.org/debian sid InRelease                        =>
    '''.replace('\\\n', '').rstrip())
def test_a_failure_of_apts_is_said_in_its_words_and_no_old_release_blamed_for_another(
        tmpdir, release, update, hint):
    lines = '''
RELEASE='%s'
missing_packages() { echo nginx; }
ensure_packages''' % {'U': 'ubuntu 12.04', 'D': 'debian 10'}[release]
    status, out, err = in_script(tmpdir, lines, apt_get=APT_GET % update)
    assert status == 1 and 'E: Unable to locate package nginx\n' in err
    assert 'could not install nginx: put right what it says above' in err
    assert ('apt-get update: ' + update in out) == (not update.startswith('Hit'))
    assert ('sed -i' in err) == bool(hint) and hint in err

@table('said, status, is_ready', '''
    nothing changed                 => 0 => yes
    wrote /usr/local/bin/dockhand   => 0 =>
    made the user git               => 0 =>
    WRONG  nothing changed          => 1 =>''')
def test_a_system_was_ready_only_where_the_installer_changed_nothing(
        tmpdir, said, status, is_ready):
    lines = 'find_python() { echo python; }; ensure_dockhand; say_if_nothing_changed'
    exited, out, _ = in_script(tmpdir, lines,
                           python="echo '%s'; exit %s" % (said, status))
    assert exited == int(status)
    assert out.startswith(said + '\n')
    assert ('this system was ready' in out) == bool(is_ready)

@table('listener, holder', '''
    LISTEN 0 511 0.0.0.0:80 0.0.0.0:* users:(("apache2",pid=812,fd=4),("apache2",pid=813,\
fd=4)) => apache2 (process 812)
    LISTEN 0 511 *:80 *:* users:(("apache2",812,4),("apache2",813,4)) => \
apache2 (process 812)
    LISTEN 0 9 [::]:80 [::]:* users:(("docker-proxy",pid=9,fd=7)) => \
docker-proxy (process 9)
    LISTEN 0 9 *:80 *:* users:(("my server",pid=77,fd=3)) => my server (process 77)
    LISTEN 0 9 *:80 *:* => '''.replace('\\\n', '').rstrip())
def test_who_keeps_nginx_from_starting_is_named(tmpdir, listener, holder):
    lines = 'ensure_up() { return 1; }; refused_ports() { echo 8080; }; ensure_nginx'
    ss = "case $* in *:80) echo '%s' ;; *) echo Netid State ;; esac" % listener
    status, out, err = in_script(tmpdir, lines, ss=ss)
    assert (status, out) == (1, '')
    why = 'nginx does not start: see '
    if holder:
        why = 'nginx does not start, since %s has port 80: stop that' % holder
    assert err.startswith('configure-system.sh: ' + why)

# ---- Https: on a machine ---------------------------------------------------------------

LIVE_FOLDER = '/etc/letsencrypt/live/dockhand-here.org'
RENEWAL = '/etc/letsencrypt/renewal/dockhand-here.org.conf'

@pytest.fixture
def secure(plain, capfd):
    """A web app with two full names, which has https."""
    plain.lives(ONE_WEB, domains='here.org www.here.org')
    dh.cmd_https(plain.host, 'blog')
    capfd.readouterr()
    del plain.ordered[:]
    del plain.done[:]
    return plain

def installed(machine, name='blog'):
    return machine.read('/etc/nginx/conf.d/%s.conf' % name)

def secured_text(machine, *names):
    """What is installed of the live release where these names have a certificate."""
    text = machine.app.wanted_proxy(machine.app.live())
    return dh.with_https(text, [certificate(name) for name in names], (1, 24, 0))

def test_https_is_one_command(plain, capfd):
    live = plain.lives(ONE_WEB, domains='here.org www.here.org blog')
    dh.cmd_https(plain.host, 'blog')
    assert plain.ordered == ['here.org', 'www.here.org']
    assert installed(plain) == secured_text(plain, 'here.org', 'www.here.org')
    assert plain.served[PROXY_FILE] == installed(plain) and plain.app.live() == live
    out, err = capfd.readouterr()
    assert re.sub(r'\d+ days', 'N days', out) == (
        'here.org: https, N days left, by Test CA\n'
        'www.here.org: https, N days left, by Test CA\n')
    for path, mode in ((CERTIFICATES, '700'), (CERTIFICATES + '/here.org.pem', '600')):
        assert mode_of(plain.host.path(path)) == mode
    assert plain.read(dh.RENEWAL_HOOK) == dh.RENEWAL_HOOK_TEXT
    assert mode_of(plain.host.path(dh.RENEWAL_HOOK)) == '755'
    dh.cmd_https(plain.host, 'blog')
    assert plain.ordered == ['here.org', 'www.here.org']     # what is there is not asked for

def test_how_a_name_is_proved_goes_before_what_certbots_own_file_says(plain):
    plain.lives(ONE_WEB, domains='here.org')
    dh.cmd_https(plain.host, 'blog')
    [order] = [words for words in plain.done if 'certbot certonly' in words]
    assert '--authenticator webroot ' in order and '--webroot ' not in order
    assert '--preferred-challenges http ' in order

def test_one_name_that_fails_leaves_the_others_their_https(plain, capfd):
    plain.lives(ONE_WEB, domains='here.org dead.test www.here.org')
    plain.refused['dead.test'] = 'no such name'
    dh.cmd_https(plain.host, 'blog')
    assert installed(plain) == secured_text(plain, 'here.org', 'www.here.org')
    assert '\ndead.test: no certificate: no such name\n' in capfd.readouterr().out
    noted = json.loads(plain.read(CERTIFICATES + '/dead.test.failed'))
    assert (noted['why'], noted['asked']) == ('no such name', True)
    del plain.refused['dead.test']
    dh.cmd_https(plain.host, 'blog')
    assert installed(plain) == secured_text(plain, 'here.org', 'dead.test', 'www.here.org')
    assert plain.read(CERTIFICATES + '/dead.test.failed') is None

def test_an_address_of_a_name_that_does_not_lead_here_is_named(plain, capfd):
    plain.lives(ONE_WEB, domains='here.org')
    plain.refused['here.org'] = 'timeout'
    dh.cmd_https(plain.host, 'blog')
    out = capfd.readouterr().out
    assert 'here.org: no certificate: timeout; 192.0.2.2 does not lead here (it answers' in out
    assert ', ::5 does not lead here' in out
    assert dh.list_folder(plain.host.path(dh.CHALLENGES + dh.CHALLENGE_PATH)) == []

@table('place, is_own', r"""
    /.well-known/acme-challenge/        => yes
    ^~ /.well-known/acme-challenge      => yes
    ~ ^/[.]well-known/acme-challenge/.+ => yes
    /.well-known/                       =>
    /                                   =>""")
def test_a_place_for_challenges_that_a_file_brings_is_told_where_no_certificate_came(
        plain, capfd, place, is_own):
    plain.lives(an_app('one', proxy=WEB.replace('blog.example', 'here').replace(
        'location', 'location %s { root /var/www; }\n location /x' % place, 1)))
    plain.refused['here.org'] = '404'
    dh.cmd_https(plain.host, 'blog')
    out = capfd.readouterr().out
    told = '404; its nginx-proxy.conf has a location for that path: leave it out\n'
    assert (told in out) == bool(is_own)
    assert ('does not lead here' in out) == (not is_own)

def test_a_push_asks_for_what_is_missing_once_in_twelve_minutes(secure, capfd):
    secure.refused['api.here.org'] = 'no'
    dh.cmd_config(secure.app, 'domains=here.org api.here.org there.org')
    assert secure.ordered == ['api.here.org']       # the last one leads elsewhere
    for number in range(5):
        dh.after_push(secure.app, None)
    err = capfd.readouterr().err
    assert secure.ordered == ['api.here.org']
    assert err.count('https: api.here.org has no certificate: no;') == 6
    assert 'has no certificate: it leads to 192.0.2.7: point it here in DNS\n' in err
    assert re.search(r'a push after \d\d:\d\d tries again, or now: sudo dockhand https blog',
                     err)
    secure.host.clock.ahead += 721
    dh.after_push(secure.app, None)
    assert secure.ordered == ['api.here.org'] * 2

@pytest.mark.parametrize('text', ['{', '[]', '{"time": 1}', '\0'])
def test_what_is_no_note_of_a_failure_is_none(secure, capfd, text):
    os.unlink(secure.host.path(CERTIFICATES, 'here.org.pem'))
    shutil.rmtree(secure.host.path(LIVE_FOLDER))
    secure.write(CERTIFICATES + '/here.org.failed', text)
    dh.cmd_https(secure.host)
    assert 'here.org                       no certificate yet: ' in capfd.readouterr().out
    dh.after_push(secure.app, None)
    assert secure.ordered == ['here.org']

def test_a_person_who_asks_is_not_kept_waiting(secure):
    secure.refused['www.here.org'] = 'no'
    os.unlink(secure.host.path(CERTIFICATES, 'www.here.org.pem'))
    os.unlink(secure.host.path('/etc/letsencrypt/renewal/dockhand-www.here.org.conf'))
    for number in range(2):
        dh.cmd_https(secure.host, 'blog')
    assert secure.ordered == ['www.here.org'] * 2

def test_https_that_was_noted_comes_with_the_first_push(plain, capfd):
    plain.nginx()
    plain.host.nginx.restore('blog', None)
    plain.write('/home/git/' + dh.KEYS, keys_text(Key('ssh-ed25519', 'AAAA', 'anna', ())))
    dh.cmd_https(plain.host, 'blog')
    assert capfd.readouterr().out.endswith('its certificates are got with its first push\n')
    plain.refused['here.org'] = 'away'
    plain.push(an_app('one', proxy=WEB.replace('blog.example', 'here')), old=ZERO, new=SHA)
    dh.after_push(plain.app, None)
    assert plain.app.live().number == 1 and plain.ordered == ['here.org']
    plain.refused.clear()
    dh.cmd_https(plain.host, 'blog')
    assert installed(plain) == secured_text(plain, 'here.org')

def test_where_another_app_takes_all_names_the_first_push_gets_the_certificates(
        plain, capfd):
    plain.nginx()
    plain.write('/etc/nginx/conf.d/wiki.conf', "# dockhand: wiki's proxy file\n"
                'server { listen 80 default_server; location / { root /x; } }\n')
    plain.host.nginx.restore('blog', None)
    plain.write('/home/git/' + dh.KEYS, keys_text(Key('ssh-ed25519', 'AAAA', 'anna', ())))
    dh.cmd_config(plain.app, 'domains=here.org')
    dh.cmd_https(plain.host, 'blog')
    assert plain.ordered == []              # an authority would have said no, and counted
    assert capfd.readouterr().out.endswith('here.org: no certificate: %s\n' % dh.NOT_YET)
    plain.push(ONE_WEB, old=ZERO, new=SHA)
    dh.after_push(plain.app, None)
    assert plain.ordered == ['here.org']
    assert installed(plain) == secured_text(plain, 'here.org')

def test_before_the_first_push_the_names_of_config_are_certified(plain, capfd):
    plain.nginx()
    plain.host.nginx.restore('blog', None)
    dh.cmd_config(plain.app, 'domains=here.org')
    dh.cmd_https(plain.host, 'blog')
    assert plain.ordered == ['here.org'] and 'acme-challenge' in plain.caught
    assert 'here.org: https, ' in capfd.readouterr().out
    dh.cmd_config(plain.app, 'domains=www.here.org')
    assert plain.read(CERTIFICATES + '/here.org.pem') is None
    assert plain.read(RENEWAL) is None

@pytest.mark.parametrize('act', [
    lambda machine: machine.push(TWO_WEB),
    lambda machine: (machine.push(TWO_WEB), dh.cmd_rollback(machine.app)),
    lambda machine: dh.cmd_config(machine.app, 'A=2'),
    lambda machine: dh.cmd_rebuild(machine.app),
    lambda machine: dh.cmd_restart(machine.app),
    lambda machine: (dh.cmd_stop(machine.app), dh.cmd_start(machine.app)),
    lambda machine: dh.cmd_stop(machine.app),
    lambda machine: dh.cmd_recover(machine.host),
    lambda machine: pytest.raises(Failure, machine.push, an_app('fail')),
    lambda machine: pytest.raises(Failure, machine.push, an_app('dies'))])
def test_https_stays_whatever_becomes_of_the_app(secure, act):
    act(secure)
    live = secure.app.live()
    assert installed(secure) == secured_text(secure, 'here.org', 'www.here.org')
    assert secure.served[PROXY_FILE] == installed(secure) and secure.ordered == []
    assert 'https' not in live.proxy and 'listen 443' in installed(secure)

def test_a_rollback_to_before_https_is_served_by_https(plain):
    plain.lives(ONE_WEB, domains='here.org')
    plain.push(TWO_WEB)
    dh.cmd_https(plain.host, 'blog')
    dh.cmd_rollback(plain.app)
    assert plain.app.live().number == 1
    assert installed(plain) == secured_text(plain, 'here.org')

@pytest.mark.parametrize('name, told', [
    ('api.here.org', ''),
    ('there.org', 'https: there.org has no certificate: it leads to 192.0.2.7: ')])
def test_a_rollback_to_other_names_gets_their_certificates_or_says_why_not(
        plain, capfd, name, told):
    plain.lives(ONE_WEB, domains=name)
    dh.cmd_config(plain.app, 'domains=here.org')
    dh.cmd_https(plain.host, 'blog')
    del plain.ordered[:]
    dh.cmd_rollback(plain.app)
    err = capfd.readouterr().err
    if told:
        assert told in err and plain.ordered == []
    else:
        assert installed(plain) == secured_text(plain, name)
        assert 'blog: https://%s/ answers 200\n' % name in err

def test_a_certificate_is_no_change_of_the_file_and_one_by_hand_is(secure, capfd):
    os.unlink(secure.host.path(CERTIFICATES, 'www.here.org.pem'))
    secure.push(TWO_WEB)
    text = installed(secure)
    assert text == secured_text(secure, 'here.org')
    secure.write('/etc/nginx/conf.d/blog.conf', text.replace('100m', '1m'))
    said = refusal(secure.push, an_app('three'), MAIN, SHA_2, SHA_3)
    assert said.startswith('to keep that, commit it in nginx-proxy.conf and push')
    err = capfd.readouterr().err
    assert '-    client_max_body_size 100m;\n' in err and 'listen 443' not in err
    assert refusal(dh.cmd_https, secure.host, 'blog') == (
        '/etc/nginx/conf.d/blog.conf was changed on the server, and stays as it is: see '
        'dockhand doctor')

@pytest.mark.parametrize('text', [None, '', '-----BEGIN CERTIFICATE-----\nxxx'])
def test_a_certificate_that_is_lost_costs_its_name_https_and_nginx_no_start(secure, text):
    path = secure.host.path(CERTIFICATES, 'here.org.pem')
    os.unlink(path)
    if text is not None:
        secure.write(CERTIFICATES + '/here.org.pem', text)
    shutil.rmtree(secure.host.path('/proc/50'))             # nginx does not run
    if text is None:
        assert secure.nginx().status == 1
    shutil.move(secure.host.path('/etc/letsencrypt'), secure.host.path('/aside'))
    secure.refused['here.org'] = 'no'       # nothing can be had now
    dh.cmd_recover(secure.host)
    shutil.rmtree(secure.host.path('/etc/letsencrypt'))
    shutil.move(secure.host.path('/aside'), secure.host.path('/etc/letsencrypt'))
    secure.refused.clear()
    del secure.ordered[:]
    assert secure.host.nginx.master()
    assert installed(secure) == secured_text(secure, 'www.here.org')
    dh.cmd_https(secure.host, 'blog')
    assert installed(secure) == secured_text(secure, 'here.org', 'www.here.org')
    assert secure.ordered == []             # certbot had it

def push_wiki(machine):
    machine.commits[SHA_3] = an_app('one', proxy=(
        'server { listen 80; server_name wiki.test; location / { proxy_pass http://wiki; }'
        ' }\n'))
    branches, machine.refs = machine.refs, {}
    dh.receive(machine.host, 'update', 'wiki', 'anna', MAIN, ZERO, SHA_3)
    machine.refs = branches

@pytest.mark.parametrize('text', [None, '', 'x', '-----BEGIN CERTIFICATE-----\nxxx'])
@pytest.mark.parametrize('act', [
    push_wiki,
    lambda machine: machine.host.nginx.refresh(),
    lambda machine: machine.host.nginx.remove('wiki'),
    lambda machine: machine.host.nginx.restore('wiki', None)])
def test_a_certificate_that_is_lost_keeps_no_other_app_from_its_changes(
        secure, capfd, act, text):
    path = CERTIFICATES + '/here.org.pem'
    os.unlink(secure.host.path(path))
    if text is not None:
        secure.write(path, text)
    secure.write('/home/git/' + dh.KEYS, keys_text(Key('ssh-ed25519', 'AAAA', 'anna', ())))
    if act is not push_wiki:
        secure.write('/etc/nginx/conf.d/wiki.conf', "# dockhand: wiki's proxy file\n")
    act(secure)
    assert ('https: %s is lost: installing the proxy file of blog without\n' % path
            in capfd.readouterr().err)
    assert installed(secure) == secured_text(secure, 'www.here.org')
    if act is push_wiki:
        assert dh.App(secure.host, 'wiki').live().number == 1
    dh.after_push(secure.app, None)
    assert secure.read(path) and secure.ordered == []

BROKEN_PEM = pem('here.org').replace('names=', 'BROKEN names=')

@pytest.mark.parametrize('act', [
    push_wiki,
    lambda machine: machine.host.nginx.refresh(),
    lambda machine: machine.push(TWO_WEB),
    lambda machine: dh.cmd_stop(machine.app),
    lambda machine: (shutil.rmtree(machine.host.path('/proc/50')),
                     dh.cmd_recover(machine.host))])
def test_a_certificate_that_nginx_cannot_load_keeps_it_from_nothing(secure, capfd, act):
    path = CERTIFICATES + '/here.org.pem'
    secure.write('/home/git/' + dh.KEYS, keys_text(Key('ssh-ed25519', 'AAAA', 'anna', ())))
    shutil.move(secure.host.path('/etc/letsencrypt'), secure.host.path('/aside'))
    secure.refused['here.org'] = 'no'       # nothing else can be had now
    secure.refused['www.here.org'] = 'no'
    secure.write(path, BROKEN_PEM)
    act(secure)
    assert ('https: nginx cannot load %s: it is %s.broken now\n' % (path, path)
            in capfd.readouterr().err)
    assert secure.read(path) is None and secure.read(path + '.broken') == BROKEN_PEM
    assert installed(secure) == secured_text(secure, 'www.here.org')
    assert secure.host.nginx.master() and path not in str(secure.served)
    secure.refused.clear()
    dh.cmd_https(secure.host, 'blog')
    assert installed(secure) == secured_text(secure, 'here.org', 'www.here.org')
    dh.cmd_destroy(secure.app, force=True)
    assert dh.list_folder(secure.host.path(CERTIFICATES)) == []

def test_a_push_goes_on_where_openssl_is_not_here(secure, capfd):
    secure.write(CERTIFICATES + '/own/blog.pem', pem('*.here.org'))
    secure.openssl = lambda *_: refuse_openssl()
    secure.push(TWO_WEB)
    dh.after_push(secure.app, None)
    assert secure.app.live().number == 2
    assert installed(secure) == secured_text(secure, 'here.org', 'www.here.org')
    secure.absent.append('openssl')
    told = refusal_of_doctor(secure, capfd)
    assert 'WRONG  openssl is missing: it reads certificates\n' in told
    assert 'here.org' not in told

def refuse_openssl():
    raise Failure('openssl: No such file or directory')

def test_doctor_has_lost_certificates_mended_by_recover(sound, capfd):
    os.unlink(sound.host.path(CERTIFICATES, 'here.org.pem'))
    sound.nginx_t = lambda *_: Result(
        1, '', 'nginx: [emerg] cannot load certificate "%s/here.org.pem": x\n' % CERTIFICATES)
    assert re.search('WRONG  cannot load certificate .*\n       type: sudo dockhand recover\n',
                     refusal_of_doctor(sound, capfd))

def test_where_certbot_is_removed_https_goes_on(secure, capfd):
    shutil.rmtree(secure.host.path('/etc/letsencrypt'))
    secure.has_certbot = False
    secure.push(TWO_WEB)
    dh.after_push(secure.app, None)
    dh.cmd_recover(secure.host)
    assert installed(secure) == secured_text(secure, 'here.org', 'www.here.org')
    assert ('https: nothing renews the certificate of here.org: certbot is missing: apt-get'
            ' install certbot\n') in capfd.readouterr().err
    assert refusal(dh.cmd_https, secure.host, 'blog') == (
        'certbot is missing: apt-get install certbot')
    secure.has_certbot = True               # without what it had
    dh.after_push(secure.app, None)
    assert secure.ordered == ['here.org', 'www.here.org']
    assert 'key=k1' in secure.read(CERTIFICATES + '/here.org.pem')

def test_another_certbot_is_waited_for(plain):
    plain.lives(ONE_WEB, domains='here.org')
    plain.others = 3
    dh.cmd_https(plain.host, 'blog')
    assert installed(plain) == secured_text(plain, 'here.org')

def test_a_certbot_that_does_not_end_is_not_waited_for_for_ever(plain, capfd):
    plain.lives(ONE_WEB, domains='here.org')
    plain.others = 10 ** 6
    dh.cmd_https(plain.host, 'blog')
    assert 'here.org: no certificate: ' + dh.NO_TIME in capfd.readouterr().out
    plain.others = 0
    dh.after_push(plain.app, None)          # that was no failure of the authority's
    assert plain.ordered == ['here.org']

@pytest.mark.parametrize('is_asked', [False, True])
@pytest.mark.parametrize('slow', ['names', 'certbot'])
def test_many_names_are_not_waited_for_longer_than_one(plain, slow, is_asked):
    names = ['n%d.here.org' % number for number in range(200)]
    plain.lives(ONE_WEB, domains=' '.join(names))
    clock = plain.host.clock
    asked = []

    def getent(_, name):
        asked.append(name)
        clock.ahead += 2                # no name server answers
        return '192.0.2.2  STREAM x\n' if slow == 'certbot' else ''
    plain.getent = getent
    if slow == 'certbot':
        plain.others = 10 ** 6
    begin = clock.monotonic()
    problems = dict(dh.get_certificates(plain.app, is_asked))
    assert clock.monotonic() - begin < dh.CERTBOT_TIMEOUT + 30
    assert len(set(asked)) < 200 and sorted(problems) == sorted(names)
    assert problems['n199.here.org'] == dh.NO_TIME_LEFT
    assert dh.https_text(plain.app, 'n199.here.org').startswith(
        'no certificate: there was no time left for it')

def test_what_a_killed_certbot_left_is_removed_before_the_next_order(plain):
    plain.lives(ONE_WEB, domains='here.org')
    plain.write(RENEWAL, '')
    for folder in ('live', 'archive'):
        plain.write('/etc/letsencrypt/%s/dockhand-here.org/cert1.pem' % folder, '')
    dh.cmd_https(plain.host, 'blog')
    assert installed(plain) == secured_text(plain, 'here.org')
    assert dh.list_folder(plain.host.path('/etc/letsencrypt/live')) == [
        'dockhand-here.org']

def test_what_certbot_renewed_before_it_was_killed_is_taken_over(secure, capfd):
    for name, text in (('fullchain', pem('here.org', 'k5').partition('-----BEGIN P')[0]),
                       ('privkey', pem('here.org', 'k5').partition('-----END C')[2])):
        text = text.partition('\n')[2] if name == 'privkey' else text
        secure.write('%s/%s.pem' % (LIVE_FOLDER, name), text)
    assert 'and nginx has the old one' in refusal_of_doctor(secure, capfd)
    for act in (lambda: dh.after_push(secure.app, None),
                lambda: dh.cmd_recover(secure.host),
                lambda: dh.cmd_https(secure.host, 'blog')):
        secure.write(CERTIFICATES + '/here.org.pem', pem('here.org'))
        act()
        assert secure.read(CERTIFICATES + '/here.org.pem') == pem('here.org', 'k5')
        assert 'key=k5' in secure.served_pem('here.org')
    assert secure.ordered == []

def test_a_key_of_another_certificate_is_not_taken_over(secure, capfd):
    before = secure.read(CERTIFICATES + '/here.org.pem')
    text = dh.pem_blocks(secure.read(LIVE_FOLDER + '/privkey.pem'))[0]
    secure.write(LIVE_FOLDER + '/privkey.pem', text.replace('k1', 'k9') + '\n')
    os.unlink(secure.host.path(CERTIFICATES, 'here.org.pem'))
    secure.refused['here.org'] = 'no'
    dh.after_push(secure.app, None)
    assert secure.read(CERTIFICATES + '/here.org.pem') is None
    secure.write(LIVE_FOLDER + '/privkey.pem', text + '\n')
    dh.after_push(secure.app, None)
    assert secure.read(CERTIFICATES + '/here.org.pem') == before

def test_a_name_that_no_release_has_any_more_gives_its_certificate_back(secure, capfd):
    dh.cmd_config(secure.app, 'domains=here.org')
    assert secure.read(CERTIFICATES + '/www.here.org.pem')      # the way back is there
    dh.cmd_config(secure.app, 'A=2')
    assert 'www.here.org' not in str(secure.files().keys())
    assert 'its certificate goes' in capfd.readouterr().err
    assert secure.read(CERTIFICATES + '/here.org.pem')

def test_of_a_name_that_never_had_a_certificate_none_is_said_to_go(secure, capfd):
    os.unlink(secure.host.path(CERTIFICATES, 'www.here.org.pem'))
    os.unlink(secure.host.path('/etc/letsencrypt/renewal/dockhand-www.here.org.conf'))
    secure.write(CERTIFICATES + '/www.here.org.failed', '{"why": "no"}')
    dh.cmd_config(secure.app, 'domains=here.org')
    dh.cmd_config(secure.app, 'A=2')
    assert 'www.here.org' not in str(secure.files().keys())
    assert 'its certificate goes' not in capfd.readouterr().err

def test_destroy_takes_the_certificates_of_an_app_and_no_others(secure):
    secure.write('/etc/letsencrypt/renewal/here.org.conf', 'x')     # an admin's own
    secure.write('/etc/letsencrypt/live/here.org/fullchain.pem', 'x')
    other = dh.App(secure.host, 'wiki')
    other.save(release(app='wiki', number=1, seconds=1, proxy=(
        'server { listen 80; server_name www.here.org; }')))
    other.set_link('live', release(number=1))
    dh.cmd_destroy(secure.app, force=True)
    assert secure.read(CERTIFICATES + '/here.org.pem') is None
    assert secure.read(RENEWAL) is None
    assert secure.read(CERTIFICATES + '/www.here.org.pem')
    assert secure.read('/etc/letsencrypt/live/here.org/fullchain.pem') == 'x'

def test_an_app_under_another_name_takes_the_certificates_over(secure):
    other = dh.App(secure.host, 'shop')
    dh.cmd_config(other, 'domains=here.org www.here.org')
    dh.cmd_https(secure.host, 'shop')
    before = secure.read(CERTIFICATES + '/here.org.pem')
    dh.cmd_destroy(secure.app, force=True)
    assert secure.read(CERTIFICATES + '/here.org.pem') == before and secure.read(RENEWAL)
    dh.cmd_config(other, 'domains=www.here.org')
    assert secure.read(CERTIFICATES + '/here.org.pem') is None
    assert secure.read(RENEWAL) is None and secure.ordered == []
    assert secure.read(CERTIFICATES + '/www.here.org.pem')

def test_http_again_keeps_the_certificates_and_lets_them_be_renewed(secure, capfd):
    dh.cmd_https(secure.host, 'blog', off=True)
    assert installed(secure) == secured_text(secure)
    assert 'acme-challenge' in installed(secure) and '443' not in installed(secure)
    assert secure.read(CERTIFICATES + '/here.org.pem')
    dh.cmd_https(secure.host, 'blog', off=True)
    assert capfd.readouterr().out == 'blog: http again\nblog: nothing changed\n'
    dh.cmd_https(secure.host, 'blog')
    assert secure.ordered == []
    assert installed(secure) == secured_text(secure, 'here.org', 'www.here.org')

@table('domains, files, said', r'''
    blog blog.* =>                        => dockhand config blog domains="..."
    _           =>                        => dockhand config blog domains="..."
    here.org    => server { listen 80; server_name blog; } => in nginx-proxy.conf
    here.org    => server { listen 8080; server_name here.org; } => in nginx-proxy.conf
    here.org    => server { listen 443 ssl; server_name here.org; } => on 443 itself''')
def test_what_cannot_be_certified_is_told_what_it_wants(plain, domains, files, said):
    plain.lives(an_app('one', proxy=files or None), domains=domains)
    before = plain.whole()
    assert said in refusal(dh.cmd_https, plain.host, 'blog')
    assert plain.changed(before) == []

@pytest.mark.parametrize('words', [{}, {'cert': True}])
def test_https_changes_nothing_where_a_person_has_changed_the_file(
        plain, monkeypatch, words):
    plain.lives(ONE_WEB, domains='here.org')
    plain.write('/etc/nginx/conf.d/blog.conf', installed(plain) + '# by hand\n')
    monkeypatch.setattr(dh, 'read_stdin', lambda: pem('here.org'))
    before = plain.whole()
    assert refusal(lambda: dh.cmd_https(plain.host, 'blog', **words)) == (
        '/etc/nginx/conf.d/blog.conf was changed on the server, and stays as it is: see '
        'dockhand doctor')
    assert plain.changed(before) == []

def test_a_name_that_was_typed_wrong_leaves_no_app_once_https_is_off(secure, capfd):
    before = secure.whole()
    dh.cmd_https(secure.host, 'bolg')
    dh.cmd_https(secure.host, 'bolg', off=True)
    assert secure.changed(before) == []
    dh.cmd_config(dh.App(secure.host, 'bolg'), 'A=1')
    dh.cmd_https(secure.host, 'bolg')
    dh.cmd_https(secure.host, 'bolg', off=True)
    assert dh.App(secure.host, 'bolg').config() == {'A': '1'}

def test_https_of_what_nginx_does_not_serve_is_refused(plain):
    plain.lives(an_app('one', ''))
    assert refusal(dh.cmd_https, plain.host, 'blog') == 'blog is no web app'
    for words in ({'off': True}, {'cert': True}):
        with pytest.raises(dh.Usage):
            dh.cmd_https(plain.host, **words)
    with pytest.raises(dh.Usage):
        dh.cmd_https(plain.host, 'blog', off=True, cert=True)

def test_a_file_that_nginx_refuses_with_https_alone_goes_on_without(secure, capfd):
    secure.push(an_app('two', proxy=(
        'server {\n    listen 80;\n    server_name here.org;\n    # HTTPS BREAKS\n'
        '    location / { proxy_pass http://blog; }\n}\n')))
    assert installed(secure) == secure.app.live().proxy
    assert ('https: nginx refuses the proxy file of blog with it, which goes on without: '
            '"x" directive is duplicate (`if ($uri ~ ') in capfd.readouterr().err
    dh.cmd_recover(secure.host)
    assert installed(secure) == secure.app.live().proxy
    dh.cmd_https(secure.host)
    assert 'http, though there is a certificate: see dockhand doctor' in (
        capfd.readouterr().out)
    said = refusal(dh.cmd_doctor, secure.host)
    out = capfd.readouterr().out
    assert 'WRONG  blog is served without https: "x" directive is duplicate' in out
    assert 'not in place' not in out
    secure.push(TWO_WEB, MAIN, SHA_2, SHA_3)
    assert installed(secure) == secured_text(secure, 'here.org', 'www.here.org')

def brought(machine, monkeypatch, text, *words):
    """What `dockhand https blog --cert` says with this on standard input."""
    monkeypatch.setattr(dh, 'read_stdin', lambda: text)
    dh.cmd_https(machine.host, 'blog', cert=True)

@pytest.mark.parametrize('text, said', [
    (pem('here.org').replace('key=k1\n-----END P', 'key=k2\n-----END P'),
     'the key does not belong to the certificate'),
    (pem('here.org', ends=1750000000), 'this certificate ended on 2025-06-1'),
    (pem('here.org', begins=3900000000), 'this certificate begins on 2093-08-0'),
    (pem('there.org'), 'good for there.org: none of that is a name of blog'),
    (pem(''), 'good for no name: none of that is a name of blog, which has here.org'),
    ('', 'are wanted, as PEM')])
def test_a_certificate_that_will_not_do_is_refused(secure, monkeypatch, text, said):
    before = secure.whole()
    assert said in refusal(brought, secure, monkeypatch, text)
    assert secure.changed(before) == []

def test_a_certificate_that_nginx_refuses_changes_nothing(plain, monkeypatch):
    plain.lives(ONE_WEB, domains='here.org')
    plain.host.nginx.form_problem = lambda *_: 'ee key too small'
    assert refusal(brought, plain, monkeypatch, pem('here.org')) == (
        'nginx does not take this certificate: ee key too small')
    assert plain.read(CERTIFICATES + '/own/blog.pem') is None
    assert not plain.host.certificates.is_on('blog')

def test_a_wildcard_that_somebody_brought_is_used_for_all_that_it_is_good_for(
        secure, monkeypatch, capfd):
    brought(secure, monkeypatch, pem('*.here.org', 'k7'))
    own = certificate('own/blog', '*.here.org')
    text = dh.with_https(secure.app.live().proxy, [own, certificate('here.org')],
                         (1, 24, 0))
    assert installed(secure) == text and 'own/blog.pem' in text
    assert mode_of(secure.host.path(CERTIFICATES, 'own/blog.pem')) == '600'
    assert re.match(r'www.here.org: https, \d+ days left, by Test CA\n\Z',
                    capfd.readouterr().out)
    dh.cmd_destroy(secure.app, force=True)
    assert dh.list_folder(secure.host.path(CERTIFICATES, 'own')) == []

def test_https_of_a_wildcard_alone_is_listed_and_turned_off_and_on(
        plain, monkeypatch, capfd):
    plain.lives(an_app('one', proxy=WEB.replace('blog.example', '*.here')))
    brought(plain, monkeypatch, pem('*.here.org'))
    text = installed(plain)
    capfd.readouterr()
    dh.cmd_https(plain.host)
    assert re.match(r'blog +\*\.here\.org +https, \d+ days left, by Test CA\n\Z',
                    capfd.readouterr().out)
    dh.cmd_https(plain.host, 'blog', off=True)
    assert '443' not in installed(plain)
    dh.cmd_https(plain.host, 'blog')
    assert installed(plain) == text and 'own/blog.pem' in text and plain.ordered == []

def test_a_certificate_that_somebody_brought_is_told_to_end(secure, monkeypatch, capfd):
    ends = int(secure.host.clock.time()) + 13 * 86400
    brought(secure, monkeypatch, pem('here.org', ends=ends))
    dh.after_push(secure.app, None)
    assert 'https: the certificate that was brought ends on %s: bring another: ' % (
        dh.time_text(ends)) in capfd.readouterr().err

def test_the_list_of_https_says_why_not(secure, capfd):
    dh.cmd_config(secure.app, 'domains=here.org there.org')
    other = dh.App(secure.host, 'wiki')
    other.save(release(app='wiki', number=1, seconds=1, proxy=(
        'server { listen 80; server_name wiki.test; }')))
    other.set_link('live', release(number=1))
    capfd.readouterr()
    dh.cmd_https(secure.host)
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(None, 2)[:2] for line in lines] == [
        ['blog', 'here.org'], ['blog', 'there.org'], ['wiki', 'wiki.test']]
    assert [re.sub(r'\d+ days', 'N days', line.split(None, 2)[2]) for line in lines] == [
        'https, N days left, by Test CA',
        'no certificate: it leads to 192.0.2.7: point it here in DNS',
        'http: sudo dockhand https wiki']

def refusal_of_doctor(machine, capfd):
    """What doctor prints that finds something wrong."""
    capfd.readouterr()
    refusal(dh.cmd_doctor, machine.host)
    return capfd.readouterr().out

@pytest.fixture
def sound(secure, capfd):
    """A server with https at which doctor finds nothing."""
    dh.cmd_install(secure.host)
    secure.write('/etc/cron.d/certbot', 'x')
    dh.cmd_doctor(secure.host)
    assert capfd.readouterr().out.endswith('all is well\n')
    return secure

def late(machine):
    """Let the certificate of here.org be in its last quarter, and certbot's log say why."""
    now = int(machine.host.clock.time())
    text = pem('here.org', 'k1', 'Test CA', now - 80 * 86400, now + 10 * 86400 + 60)
    machine.write(CERTIFICATES + '/here.org.pem', text)
    machine.write(LIVE_FOLDER + '/fullchain.pem', text.partition('-----BEGIN P')[0])
    machine.nginx_s('-s', 'reload')
    machine.write('/var/log/letsencrypt/letsencrypt.log',
                  'x:Failed to renew certificate dockhand-here.org with error: no luck\n')

@pytest.mark.parametrize('harm, said', [
    (lambda machine: setattr(machine, 'has_certbot', False),
     'certbot is missing: no certificate will be renewed\n       type: apt-get update; '
     'apt-get install certbot'),
    (lambda machine: machine.broken.update({'certbot --version': 1}),
     'certbot does not run: broken on purpose'),
    (lambda machine: os.unlink(machine.host.path('/etc/cron.d/certbot')),
     'nothing runs `certbot renew`'),
    (lambda machine: machine.absent.append('cron'), 'nothing runs `certbot renew`'),
    (late, 'the certificate of here.org ends in 10 days, and is not renewed: no luck'),
    (lambda machine: machine.write(CERTIFICATES + '/here.org.pem', pem('here.org', 'k9')),
     'certbot has renewed the certificate of here.org, and nginx has the old one'),
    (lambda machine: shutil.rmtree(machine.host.path('/etc/letsencrypt')),
     'nothing renews the certificate of here.org'),
    (lambda machine: setattr(machine, 'certified', []),
     'nginx serves another certificate for here.org than'),
    (lambda machine: machine.app.save(machine.app.live()._replace(
        proxy=machine.app.live().proxy.replace('here.org www', 'there.org www'))),
     'there.org has no certificate: there was no try yet'),
    (lambda machine: os.unlink(machine.host.path(dh.RENEWAL_HOOK)),
     dh.RENEWAL_HOOK + ' is not as installed'),
    (lambda machine: os.chmod(machine.host.path(CERTIFICATES), 0o755),
     'others may read the keys in %s\n       type: chmod 700 %s' % (
         CERTIFICATES, CERTIFICATES))])
def test_doctor_says_what_keeps_https_from_lasting(sound, capfd, harm, said):
    harm(sound)
    assert 'WRONG  ' + said in refusal_of_doctor(sound, capfd)

@pytest.mark.parametrize('names', [
    '*.here.org here.org', 'api.here.org www.here.org', 'here.org', '', 'there.org'])
def test_doctor_asks_for_a_certificate_by_a_name_that_it_is_used_for(
        sound, monkeypatch, capfd, names):
    sound.write(CERTIFICATES + '/own/blog.pem', pem(names, 'k7'))
    dh.cmd_recover(sound.host)
    dh.cmd_doctor(sound.host)
    assert capfd.readouterr().out.endswith('all is well\n')
    sound.certified = [(text, path, held.replace('k7', 'k8'))
                       for text, path, held in sound.certified]
    is_used = 'own/blog.pem' in installed(sound)
    assert is_used == (names not in ('', 'there.org'))
    if is_used:
        assert 'nginx serves another certificate for ' in refusal_of_doctor(sound, capfd)

def test_a_certificate_put_there_by_hand_that_nginx_refuses_is_named(sound, capfd):
    own = CERTIFICATES + '/own/blog.pem'
    sound.write(own, pem('here.org'))
    sound.host.nginx.form_problem = lambda *_: 'PrivateKey("%s") failed' % own
    dh.cmd_recover(sound.host)
    assert '443' not in installed(sound)
    dh.after_push(sound.app, None)
    assert 'blog: http://here.org/ answers 200\n' in capfd.readouterr().err
    said = refusal_of_doctor(sound, capfd)
    assert said == (
        'WRONG  blog is served without https: PrivateKey("%s") failed\n'
        '       type: sudo rm %s; sudo dockhand https blog\n' % (own, own))

def test_a_key_may_stand_before_its_certificate(sound, capfd):
    chain, begin, key = pem('here.org', 'k4').partition('-----BEGIN PRIVATE')
    sound.write(CERTIFICATES + '/own/blog.pem', begin + key + chain)
    dh.cmd_recover(sound.host)
    assert 'own/blog.pem' in installed(sound)
    sound.served_pem = lambda name: pem('here.org', 'k4').partition('-----BEGIN P')[0] if (
        name == 'here.org') else sound.read(CERTIFICATES + '/%s.pem' % name)
    dh.cmd_doctor(sound.host)

def test_doctor_says_that_the_timer_of_certbot_does_not_run(tmpdir, capfd):
    machine = Machine(tmpdir, 'systemd')
    machine.lives(ONE_WEB, domains='here.org')
    dh.cmd_https(machine.host, 'blog')
    dh.cmd_install(machine.host)
    machine.timer = 'inactive'
    assert ('WRONG  certbot.timer, which renews, is inactive\n       type: systemctl enable '
            '--now certbot.timer') in refusal_of_doctor(machine, capfd)

def test_doctor_says_that_a_name_does_not_lead_here_any_more(sound, capfd):
    sound.getent = lambda *_: '192.0.2.7  STREAM x\n'
    assert ('WRONG  here.org leads to 192.0.2.7, and so will not be renewed'
            in refusal_of_doctor(sound, capfd))

def test_doctor_asks_an_app_with_https_by_https(sound, capfd):
    asked = []
    connect = sound.host.connect

    def listen(place, timeout, tls_name=None):
        asked.append((place[1], tls_name))
        return connect(place, timeout, tls_name)
    sound.host.connect = listen
    dh.cmd_doctor(sound.host)
    assert (443, 'here.org') in asked
    sound.answers['here.org'] = '502'
    assert 'blog answers 502 through nginx' in refusal_of_doctor(sound, capfd)

def test_the_hook_of_certbot_acts_on_our_certificates_alone(tmpdir):
    demand_tool('openssl')
    folder = tmpdir.mkdir('certificates')
    lineage = tmpdir.mkdir('live').mkdir('dockhand-a.test')
    text = dh.RENEWAL_HOOK_TEXT.replace(CERTIFICATES, str(folder))
    text = text.replace('/run/nginx.pid', str(tmpdir.join('no.pid')))
    hook = tmpdir.join('hook')
    hook.write(text)

    def renewed(path):
        return subprocess.call(['sh', str(hook)], env={'RENEWED_LINEAGE': str(path)},
                               stderr=subprocess.PIPE)
    subprocess.check_call(['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes',
                           '-subj', '/CN=a', '-keyout', str(lineage.join('privkey.pem')),
                           '-out', str(lineage.join('fullchain.pem'))],
                          stderr=subprocess.PIPE)
    assert renewed(lineage) == 0
    assert folder.join('a.test.pem').read() == (
        lineage.join('fullchain.pem').read() + lineage.join('privkey.pem').read())
    assert mode_of(folder.join('a.test.pem')) == '600'

    kept = folder.join('a.test.pem').read()
    subprocess.check_call(['openssl', 'genrsa', '-out', str(lineage.join('privkey.pem')),
                           '2048'], stderr=subprocess.PIPE)
    assert renewed(lineage) != 0 and folder.join('a.test.pem').read() == kept
    assert os.listdir(str(folder)) == ['a.test.pem']        # no key lies about
    assert renewed(tmpdir.mkdir('live/a.test')) == 0        # somebody else's
    folder.remove()
    assert renewed(lineage) == 0                            # nobody wants it any more

def test_the_key_and_its_certificate_are_held_together_by_openssl(tmpdir):
    demand_tool('openssl')
    certificates = Host(str(tmpdir)).certificates
    for name in ('a', 'b'):
        subprocess.check_call(
            ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '90',
             '-subj', '/CN=Some CA', '-addext', 'subjectAltName=DNS:%s.test' % name,
             '-keyout', str(tmpdir.join(name + '.key')),
             '-out', str(tmpdir.join(name + '.pem'))], stderr=subprocess.PIPE)
    text = tmpdir.join('a.pem').read()
    key = tmpdir.join('a.key').read()
    path = certificates.path('a.test')
    assert certificates.keep(path, dh.ordered_pem(key + text)) is True
    assert certificates.keep(path, dh.ordered_pem(key + text)) is False
    x509 = certificates.read(path)
    assert x509.names == ['a.test'] and x509.issuer == 'Some CA'
    assert certificates.days_left(x509) == 89 and not certificates.is_late('a.test')
    said = refusal(certificates.keep, path, text + tmpdir.join('b.key').read())
    assert said == 'the key does not belong to the certificate'
    assert dh.read_file(str(tmpdir) + path) == dh.ordered_pem(key + text)

# ---- Logs, one-off commands, status ----------------------------------------------------

# What people ask of an app between pushes.

def stamped(at, text):
    return b'2026-11-29T10:00:%02d.123456789Z %s' % (at, text)

def split(reader, data, size):
    """What a reader makes of docker's output, so many bytes at a time."""
    return [each for at in range(0, len(data), size)
            for each in reader.split(data[at:at + size])]

@pytest.mark.parametrize('size', [1, 7, 50, 10 ** 6])
def test_lines_are_read_however_they_come(size):
    long_line = b'x' * (dh.PIECE + 5)
    data = (stamped(1, b'a\n') + stamped(2, b'\n') + b'Error response from daemon: x\n' +
            stamped(3, long_line[:dh.PIECE]) + stamped(3, long_line[dh.PIECE:] + b'\n') +
            stamped(4, b'2026-11-29T10:00:00.123456789Z b\n') + stamped(5, b'no end'))
    found = split(dh.LogReader('', 'x'), data, size)
    assert b''.join(each.text for each in found) == (
        b'a\n\n' + long_line + b'\n2026-11-29T10:00:00.123456789Z b\n')
    assert [each.begins for each in found] == [True, True, True, False, True]

@pytest.mark.parametrize('given, again', [
    (b'abc', b''), (b'ab', b'c'), (b'a', b'bc'), (b'', b'abc')])
def test_what_comes_once_more_is_shown_once(given, again):
    """Of one moment too: all of it is asked for again."""
    reader = dh.LogReader('', 'x')
    lines = [stamped(1, b'%s\n' % letter.encode()) for letter in 'abc']
    shown = split(reader, b''.join(lines[:len(given)]), 99)
    for each in reader.given.values():
        each.resume()
    shown += split(reader, b''.join(lines) + stamped(2, b'd\n'), 99)
    assert b''.join(each.text[:1] for each in shown) == b'abcd'

def served(at, task, text):
    return stamped(at, b'shop--1.%s    | %s' % (task, text))

@pytest.mark.parametrize('size', [1, 7, 50, 10 ** 6])
def test_what_the_containers_of_a_service_print_is_shown_once_and_in_order(size):
    """Of one after the other docker prints what it has, each by its time; asked again, it
    begins with what was printed last by the one that is silent longest."""
    long_line = b'x' * (dh.PIECE + 5)
    first = (served(5, b'1.a@web1', b'late\n') + served(2, b'2.b@web2', b'early\n')
             + b'no such task: x\n' + served(7, b'2.b@web2', long_line[:dh.PIECE])
             + served(7, b'2.b@web2', long_line[dh.PIECE:] + b'\n'))
    reader = dh.ServiceReader('web', 'x')
    come = split(reader, first, size)
    assert [(each.source, each.begins) for each in come] == [
        ('web1', True), ('web2', True), ('web2', True), ('web2', False)]
    parts = [come[:1], [], come[1:], None]
    reader.read = lambda: parts.pop(0)
    assert b''.join(each.text for each in reader.printed()) == (
        b'early\nlate\n' + long_line + b'\n')

    for each in reader.given.values():
        each.resume()
    again = split(reader, served(8, b'3.c@web3', b'newer\n') + first
                  + served(6, b'1.a@web1', b'new\n'), size)
    assert [each.text for each in again] == [b'newer\n', b'new\n']

def test_of_which_machine_a_line_is_stands_before_it(monkeypatch):
    shown = []
    monkeypatch.setattr(dh, 'write_whole', shown.append)
    line, = dh.ServiceReader('', 'x').split(served(1, b'1.a@web1', b'x\n'))
    for title in ('', 'web'):
        dh.show_printed(line, dh.ServiceReader(title, 'x'))
    assert shown == [b'web1 | x\n', b'web@web1 | x\n']

def test_of_a_new_release_all_is_followed_and_of_an_old_one_what_was_not_shown(
        plain, monkeypatch):
    """docker says that a container is started after it may have printed."""
    begun = []

    def begin(reader, *words):
        begun.append((reader.container,) + words)
        reader.process = True
    monkeypatch.setattr(dh.LogReader, 'begin', begin)
    plain.lives(ONE_WEB)
    live = plain.app.live()
    first, = readers = dh.log_readers(plain.app, live, None)
    follower = dh.Follower(plain.app, live, None, readers, 'T0')

    plain.push(TWO_WEB)
    follower.look_for_another()
    assert begun == [('blog--2', '--follow', '--since=T0')] and follower.older == [first]

    first.given, first.process = {b'': dh.Given()}, None
    dh.cmd_rollback(plain.app)
    follower.look_for_another()
    assert begun[1:] == [('blog--1', '--follow')]
    assert follower.readers == [first] and first not in follower.older

    first.given, first.process = {}, None
    follower.look_for_another()
    assert begun[2:] == [('blog--1', '--follow', '--since=T0')]

@pytest.mark.parametrize('text, said', [
    ('30m', '30m'), ('2d', '48h'), ('2026-01-31', '2026-01-31'),
    ('2026-01-31T06:00', '2026-01-31T06:00'),
    ('2026-01-31T06:00:00', '2026-01-31T06:00:00'),
    ('2026-01-31T06:00:00Z', '2026-01-31T06:00:00Z'),
    ('2026-01-31T06:00:00.5+02:00', '2026-01-31T06:00:00.5+02:00')])
def test_since_is_what_docker_reads(text, said):
    assert dh.read_since(text) == said

@each('number', 'x -5 1e3 +1 1_000', '', '\xb2', '\u0663', '9' * 23)
def test_the_number_of_lines_is_one_that_docker_takes(plain, number):
    plain.lives(ONE_WEB)
    assert '-n wants a number' in refusal(lambda: dh.cmd_logs(plain.app, n=number))

@each('text', '''1y -1h h 1 yesterday 2026-1-1 $(id) 2026-01-31;id 2026-99-99 0000-00-00 2026-02-30
      2026-01-31T25:00:00 2026-01-31T06:60 2026-01-01Z-Z+T 2026-01-31T06:00:00+99
      2026-01-31T''', '', '\u0663m', '1h\n', '2026-01-31\n')
def test_another_since_is_refused(text):
    assert '--since wants 30m' in refusal(dh.read_since, text)

def attended(machine, act, during=lambda: None, status=3):
    """Run a command of ours that attends another; (its exit status, what is attended)."""
    asked = []

    def attend(argv):
        asked.append(argv)
        during()
        return status
    kept, dh.attend = dh.attend, attend
    try:
        return act(), asked[0] if asked else None
    finally:
        dh.attend = kept

RUNS = '/var/lib/dockhand/apps/blog/runs'

def begun_here(machine, *words):
    """The name of a one-off command that this process attends, which is in /proc there."""
    machine.write('/proc/%d/stat' % os.getpid(),
                  '%d (x) S 1%s\n' % (os.getpid(), ' 5' * 20))
    return dh.create_one_off(machine.app, machine.app.live(), list(words), False)

def one_offs_there(machine):
    return [name for name in machine.containers if '--run-' in name]

def test_a_one_off_command_runs_beside_the_app_and_leaves_nothing(plain):
    plain.lives(ONE_DATA)
    seen = []

    def during():
        name, = one_offs_there(plain)
        seen.append(name)
        assert os.listdir(plain.host.path(RUNS)) == [name]
        with dh.locked(plain.host.path(dh.LOCKS, 'blog'), 'x'), ending():
            pass                                        # nobody holds it
    status, argv = attended(plain, lambda: dh.cmd_run(plain.app, 'ls', '-l'), during)
    assert status == 3 and argv[:4] == ['docker', 'start', '--attach', '--interactive']
    assert re.match(r'blog--1--run-[0-9a-f]{8}\Z', seen[0]) and argv[4:] == seen
    made, = [line for line in plain.done if line.startswith('docker create')]
    assert made.endswith(' sha256:FROMone ls -l') and ' --ip=' not in made
    assert '--net=dockhand' in made and '--net-alias' not in made and '--rm' in made
    assert '--volume=blog--data:/data' in made and '--label=dockhand.app=blog' in made
    assert one_offs_there(plain) == [] and os.listdir(plain.host.path(RUNS)) == []

def test_a_shell_is_run_where_no_command_is_named(plain):
    plain.lives(ONE_WEB)
    attended(plain, lambda: dh.cmd_run(plain.app))
    made, = [line for line in plain.done if line.startswith('docker create')]
    assert ' --entrypoint=sh sha256:FROMone -c ' in made

@pytest.mark.parametrize('job, there', [
    ('exec docker run --rm -v data:/data -p 25:25 -e B=2 --name blog blog',
     '--volume=data:/data --env=B=2 --pids-limit=4096'),
    ('exec docker run --rm --pids-limit 9 blog', '--pids-limit=9'),
    ('exec docker run --rm --log-opt max-size=1m blog', '--log-opt=max-size=1m'),
    ('exec docker run --rm --log-driver syslog blog', '--log-driver=syslog'),
    ('script\n    [ -e /x ] || exit 0\n    exec docker run --rm -v data:/data blog\n'
     'end script', '--env-file=/var/lib/dockhand/apps/blog/releases/1/env')])
def test_a_one_off_command_of_a_job_of_init_has_what_docker_gets_from_that(
        tmpdir, job, there):
    machine = Machine(tmpdir, 'upstart')
    machine.lives(but('job', 'start on started docker\n' + job + '\n'))
    attended(machine, lambda: dh.cmd_run(machine.app, 'x'))
    made, = [line for line in machine.done if line.startswith('docker create')]
    assert set(there.split()) <= set(made.split()), made
    assert '25:25' not in made and made.count('--pids-limit') == 1, made
    assert ('--log-driver=none' in made) == ('log-' not in job)
    assert made.count('--name') == 1

def test_a_process_of_the_procfile_is_run_once(plain):
    plain.lives(ONE_TYPES)
    attended(plain, lambda: dh.cmd_run(plain.app, process='worker'))
    made, = [line for line in plain.done if line.startswith('docker create')]
    assert made.endswith('sha256:FROMone work one')
    assert 'no process of blog is called mailer' in refusal(
        lambda: dh.cmd_run(plain.app, process='mailer'))

def test_a_one_off_command_that_is_cut_off_leaves_nothing(plain):
    plain.lives(ONE_WEB)
    assert attended(plain, lambda: dh.cmd_run(plain.app, 'x'), status=None)[0] == 1
    assert one_offs_there(plain) == [] and os.listdir(plain.host.path(RUNS)) == []

@pytest.mark.parametrize('act', [
    lambda m: dh.cmd_recover(m.host), lambda m: dh.cmd_restart(m.app),
    lambda m: m.push(TWO_WEB)])
def test_a_one_off_command_whose_dockhand_is_gone_is_removed(plain, act):
    plain.lives(ONE_WEB)
    name = dh.create_one_off(plain.app, plain.app.live(), ['x'], False)
    plain.write('%s/%s' % (RUNS, name), '%d 7' % os.getpid())    # a later one
    act(plain)
    assert one_offs_there(plain) == [] and os.listdir(plain.host.path(RUNS)) == []

def test_a_push_names_a_one_off_command_and_goes_on(plain, capfd):
    plain.lives(ONE_WEB)
    name = begun_here(plain, 'x')
    plain.push(TWO_WEB)
    assert 'Note: %s goes on, as it was begun' % name in capfd.readouterr().err
    assert one_offs_there(plain) == [name]
    dh.cmd_destroy(plain.app, force=True)
    assert plain.containers == {}

def test_a_one_off_command_that_docker_refuses_leaves_nothing(plain):
    plain.lives(ONE_WEB)
    plain.broken['docker create'] = 1
    assert 'broken on purpose' in refusal(dh.cmd_run, plain.app, 'x')
    assert os.listdir(plain.host.path(RUNS)) == []

@pytest.mark.parametrize('words, container, command', [
    ([], 'blog--1', ['sh', '-c', dh.SHELL]), (['worker'], 'blog--1--worker',
                                              ['sh', '-c', dh.SHELL]),
    (['worker', 'ls', '-l'], 'blog--1--worker', ['ls', '-l']),
    (['ls', '-l'], 'blog--1', ['ls', '-l'])])
def test_one_enters_what_runs(plain, words, container, command):
    plain.lives(ONE_TYPES)
    status, argv = attended(plain, lambda: dh.cmd_enter(plain.app, *words))
    assert status == 3 and argv[:3] == ['docker', 'exec', '--interactive']
    web, worker = 'blog--1', 'blog--1--worker'
    first = {'blog--1': web, worker: worker}[container]
    if container == 'blog--1' and argv[4] == worker:
        first = worker                          # it stands first in this Procfile
    assert argv[4:] == [first] + command

@pytest.mark.parametrize('words, container', [
    ([], 'blog--1'), (['worker'], 'blog--1--worker'), (['web', 'ls'], 'blog--1')])
def test_nobody_enters_what_does_not_run(plain, words, container):
    plain.lives(ONE_TYPES)
    plain.containers[container]['State'].update(Running=False)
    said, asked = attended(plain, lambda: refusal(dh.cmd_enter, plain.app, *words))
    assert asked is None
    assert said == '%s of blog does not run: see dockhand status blog' % (
        'worker' if words == ['worker'] else 'web')
    del plain.containers[container]
    assert 'does not run' in refusal(dh.cmd_enter, plain.app, *words)

@pytest.mark.parametrize('line, given, options', [
    ('blog ls -la --x', ['blog', 'ls', '-la', '--x'], {}), ('blog', ['blog'], {}),
    ('--process web blog ls', ['blog', 'ls'], {'process': 'web'}),
    ('blog --process web ls --process', ['blog', 'ls', '--process'], {'process': 'web'}),
    ('blog -- ls', ['blog', 'ls'], {})])
def test_the_options_of_a_command_are_its_own(line, given, options):
    pattern = 'APP [--process TYPE] [COMMAND...]'
    assert dh.parse_arguments(pattern, line.split()) == (given, options)

def test_what_attends_ends_with_what_it_attends_and_with_its_reader():
    assert dh.attend(['sh', '-c', 'exit 7']) == 7
    reader, writer = os.pipe()
    os.close(reader)
    kept = os.dup(1)
    os.dup2(writer, 1)
    try:
        assert dh.is_hung_up()
        with ending():
            assert dh.attend(['sleep', '100']) is None
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(writer)
    assert not dh.is_hung_up()

def test_the_status_of_an_app_is_on_one_screen(plain, capfd):
    plain.lives(dict(ONE_TYPES, **an_app('one', CHECKED)), scale='worker=2')
    refusal(plain.push, dict(TWO_TYPES, Dockerfile='FROM fail'))
    container = plain.containers['blog--1']
    container['State'].update(StartedAt='2026-01-01T00:00:00.5Z', Pid=77)
    container['RestartCount'] = 2
    plain.write('/proc/77/status', 'VmRSS:\t 2048 kB\n')
    plain.volumes = ['blog--data', 'other--data']
    plain.du = lambda *words: '12\t/x\n'
    plain.timeout = lambda seconds, name, *words: getattr(plain, name)(*words)
    capfd.readouterr()
    dh.cmd_status(plain.host, 'blog')
    said = capfd.readouterr().out
    for part in ('blog: running, started again 2 times', 'release      1, 1111111111',
                 'push by anna', 'web  healthy  for ', 'started again 2 times  memory 2.1 MB',
                 'worker.2  healthy', 'images 5.0 MB', 'volume blog--data 12 kB',
                 'failed: ', 'refused'):
        assert part in said, (part, said)
    assert said.count('\n') < 24
    dh.cmd_status(plain.host, 'blog', json=True)
    found = json.loads(capfd.readouterr().out)
    assert found['app'] == 'blog' and found['state'] == 'running'
    assert [each['process'] for each in found['containers']] == ['web', 'worker', 'worker.2']
    assert found['volumes'] == [{'name': 'blog--data', 'bytes': 12288}]
    assert 'no app wiki here' in refusal(dh.cmd_status, plain.host, 'wiki')

def test_what_never_went_live_has_a_status_too(plain, capfd):
    plain.nginx()
    refusal(lambda: plain.push(an_app('dies'), old=ZERO, new=SHA))
    capfd.readouterr()
    dh.cmd_status(plain.host, 'blog')
    said = capfd.readouterr().out
    assert said.startswith('blog: waiting, for a push that succeeds; the last one: ')

def test_the_server_and_each_app_are_a_line_of_its_status(plain, capfd):
    plain.lives(ONE_WEB)
    plain.write('/proc/meminfo', 'MemTotal: 2000000 kB\nMemAvailable: 500000 kB\n')
    plain.write('/proc/loadavg', '0.10 0.20 0.30 1/2 3\n')
    capfd.readouterr()
    dh.cmd_status(plain.host)
    said = capfd.readouterr().out
    assert 'load         0.10 0.20 0.30\nmemory       512 MB free of 2.0 GB\n' in said
    assert 'nginx        runs' in said and said.splitlines()[-1].startswith('blog  ')
    dh.cmd_status(plain.host, json=True)
    assert json.loads(capfd.readouterr().out)['apps'][0]['app'] == 'blog'

@pytest.mark.parametrize('count, text', [
    (None, '?'), (0, '0 B'), (999, '999 B'), (1500, '1.5 kB'), (25e6, '25 MB'),
    (3.2e9, '3.2 GB'), (9e12, '9.0 TB'), (9e15, '9000 TB')])
def test_sizes_are_said_in_a_unit_that_fits(count, text):
    assert dh.size_text(count) == text

@pytest.mark.parametrize('seconds, text', [
    (0, '0 s'), (59, '59 s'), (61, '1 min 1 s'), (3600, '1 h 0 min'),
    (90061, '1 d 1 h')])
def test_spans_are_said_in_their_two_largest_units(seconds, text):
    assert dh.span_text(seconds) == text

@pytest.mark.parametrize('harm, said', [
    (lambda m: m.containers['blog--1']['State'].update(OOMKilled=True),
     'WRONG  web of blog was out of memory, and the kernel killed it\n       type: dockhand '
     'config blog options="--memory 1g"'),
    (lambda m: m.containers['blog--1']['State'].update(Health={'Status': 'unhealthy'}),
     'WRONG  the HEALTHCHECK of blog says unhealthy\n       type: dockhand logs blog'),
    (lambda m: m.containers['blog--1']['State'].update(Running=False),
     'WRONG  blog does not run'),
    (lambda m: m.broken.update({'docker version': 9}), 'WRONG  docker does not answer'),
    (lambda m: m.broken.update({'nginx -t': 9}), 'WRONG  ')])
def test_doctor_says_what_is_wrong_with_an_app(plain, capfd, harm, said):
    plain.lives(ONE_WEB)
    capfd.readouterr()
    dh.cmd_doctor(plain.host, 'blog')
    dh.cmd_doctor(plain.host, 'blog', quiet=True)
    assert capfd.readouterr().out == 'all is well\n'
    harm(plain)
    assert re.match(r'\d thing\(s\) to mend', refusal(dh.cmd_doctor, plain.host, 'blog'))
    assert said in capfd.readouterr().out

def test_doctor_says_where_an_app_listens(plain, capfd, monkeypatch):
    plain.lives(an_app('one', ''))
    monkeypatch.setattr(dh, 'listening_ports', lambda host, pids: ([], [3000]))
    refusal(dh.cmd_doctor, plain.host, 'blog')
    assert ('WRONG  blog listens on 3000, and nginx passes nothing to it\n       type: '
            'dockhand config blog port=3000 (or port=none)') in capfd.readouterr().out
    plain.push(TWO_WEB)
    monkeypatch.setattr(dh, 'listening_ports', lambda host, pids: ([8000], []))
    refusal(dh.cmd_doctor, plain.host, 'blog')
    assert 'WRONG  blog listens on 127.0.0.1:8000 alone' in capfd.readouterr().out

def test_doctor_of_an_app_that_was_never_live_says_why(plain, capfd):
    dh.cmd_config(plain.app, 'A=1')
    refusal(dh.cmd_doctor, plain.host, 'blog')
    assert 'blog was never live; it waits for its first push' in capfd.readouterr().out
    assert 'no app wiki here' in refusal(dh.cmd_doctor, plain.host, 'wiki')

@pytest.mark.parametrize('proxy, logs', [
    (None, [('/var/log/nginx/blog.log', 'dockhand')]),
    ('server { listen 80; server_name a.org; access_log /var/log/nginx/blog.log; }\n',
     [('/var/log/nginx/blog.log', 'combined')]),
    ('server { listen 80; server_name a.org; access_log /var/log/nginx/blog-x.log combined; '
     'location / { access_log off; } location /a { access_log /var/log/nginx/blog.log; } }\n',
     [('/var/log/nginx/blog-x.log', 'combined'), ('/var/log/nginx/blog.log', 'combined')])])
def test_what_is_reported_is_what_the_file_of_an_app_has_noted(plain, proxy, logs):
    live = plain.lives(an_app('one', proxy=proxy))
    assert dh.access_logs(plain.app, live) == logs

@pytest.mark.parametrize('proxy, said', [
    ('server { listen 80; server_name a.org; }\n', 'are not measured: they are in no log of'),
    ('log_format x "$uri"; server { listen 80; server_name a.org; '
     'access_log /var/log/nginx/blog.log x; }\n', 'a format of its own, x')])
def test_what_cannot_be_reported_is_said(plain, proxy, said):
    live = plain.lives(an_app('one', proxy=proxy))
    assert said in refusal(dh.access_logs, plain.app, live)

def test_a_log_is_read_from_its_oldest_part_on(plain):
    for name in ('blog.log', 'blog.log.1', 'blog.log.2.gz', 'blog.log.10.gz', 'blogs.log',
                 'wiki.log', 'wiki.log-20260102.gz', 'wiki.log-20260201'):
        plain.write(LOGS + '/' + name, '')

    def parts(app):
        return [os.path.basename(path) for path in dh.parts_of_log(
            plain.host, '%s/%s.log' % (LOGS, app))]
    assert parts('blog') == ['blog.log.10.gz', 'blog.log.2.gz', 'blog.log.1', 'blog.log']
    assert parts('wiki') == ['wiki.log-20260102.gz', 'wiki.log-20260201', 'wiki.log']

def test_a_report_wants_goaccess(plain):
    plain.lives(ONE_WEB)
    plain.absent.append('goaccess')
    assert 'goaccess is missing here: apt-get' in refusal(dh.cmd_report, plain.app)

def test_keys_tells_when_each_came_last(plain, capfd):
    upload(plain, LINE, 'anna')
    upload(plain, LINE_2, 'bob', 'shop-', read_only=True)
    dh.note_use(plain.host, 'bob')
    capfd.readouterr()
    dh.cmd_keys(plain.host)
    first, second = capfd.readouterr().out.splitlines()
    assert 'never used' in first and second.endswith('  may read shop-')
    dh.cmd_keys(plain.host, json=True)
    found = json.loads(capfd.readouterr().out)
    assert [(each['name'], each['apps'], each['read_only']) for each in found] == [
        ('anna', None, False), ('bob', ['shop-'], True)]
    assert found[0]['used'] is None and abs(found[1]['used'] - time.time()) < 99

# ---- The real layer --------------------------------------------------------------------

# Dockhand on fresh servers, with real git, sshd, sudo, docker and nginx.

# ---- From nothing to an answer ---------------------------------------------------------

@everywhere
def test_real_one_command_makes_a_fresh_server_deploy(server):
    if server.demo is None:
        pytest.skip('the servers were kept')
    assert re.findall(r'(?m)^Hello .*', server.demo) == [
        'Hello from a container', 'Hello again', 'Hello again', 'Hello from a job']
    assert 'remote: dockhand: the build failed' in server.demo
    assert len(re.findall('Release 2 is live: .*, no gap', server.demo)) == 1
    assert 'demo-app is removed' in server.demo
    if server.kind == 'systemd':        # `recover` follows a docker that is killed by now
        assert 'dockhand-recover.service' in server.ok('systemctl show -p Wants docker')
    assert server.run('sh', '-c', 'ss -Hlnu | grep :5353').out == ''

@everywhere
def test_real_a_second_run_changes_nothing(server):
    def look():
        pids = server.ok('cat /run/docker.pid /run/nginx.pid /run/sshd.pid; '
                         'pidof avahi-daemon || :')
        times = server.ok('find /usr/local /etc/nginx /home/git -type f -printf "%p %T@"')
        return pids, times, server.manifest('/etc', '/usr/local', '/var/lib/dockhand',
                                            '/home/git')
    before = look()
    said = server.ok('sh /root/dockhand/configure-system.sh')
    assert 'nothing changed' in said and 'this system was ready' in said
    assert look() == before
    assert server.ok('dockhand doctor') == 'all is well'

STOP_NGINX = {
    'systemd': 'systemctl stop nginx', 'upstart': 'stop nginx',
    'none': 'nginx -s quit; while [ -e /run/nginx.pid ]; do sleep 0.1; done'}

@everywhere
def test_real_what_holds_the_port_of_nginx_is_named(server):
    server.ok(STOP_NGINX[server.kind])
    server.ok('busybox httpd -f -p 80 -h /tmp >/dev/null 2>&1 & echo $! >/root/holder')
    outcome = server.run('sh', '/root/dockhand/configure-system.sh')
    server.ok('kill $(cat /root/holder) && sh /root/dockhand/configure-system.sh')
    assert outcome.status == 1
    assert re.search(r'(?m)^configure-system.sh: nginx does not start, since busybox '
                     r'\(process \d+\) has port 80: stop that', outcome.err), outcome.err

# ---- Installed over an earlier dockhand ------------------------------------------------

# The first commit, the last before plain apps, and the first that was called whole
EARLIER = [('5e9521c',), ('b7b5522',), ('82b73e1',)]

# What `install` wrote, and what was deployed; the user stays
WIPE = '''
docker ps -aq | xargs -r docker rm -f
docker images --format '{{.Repository}}:{{.Tag}}' | grep ^elder | xargs -r docker rmi -f
rm -rf /usr/local/lib/dockhand /usr/local/bin/dockhand /usr/local/bin/gitreceive \
    /var/lib/dockhand /etc/sudoers.d/dockhand /home/git/*.git /home/git/.ssh \
    /etc/nginx/conf.d/000-dockhand.conf /etc/nginx/conf.d/elder.conf
'''

@pytest.fixture(scope='module', params=one_in(3, EARLIER))
def earlier(request):
    """dockhand.py as it was in a commit."""
    shown = run(['git', 'show', request.param + ':dockhand.py'], cwd=HERE)
    if shown.status != 0:
        (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)(
            'no commit %s here: a full clone has it' % request.param)
    return shown.out + '\n'

def deploy_early(app, files):
    """Push a commit whose id has no zero at an end: the first dockhand stripped those."""
    commit = app.commit(files)
    while '0' in commit[0] + commit[-1]:
        app.git('commit', '-q', '--amend', '-m', 'not ' + commit)
        commit = app.git('rev-parse', 'HEAD')
    pushed = app.push()
    assert pushed.status == 0, pushed.err
    return commit

@pytest.fixture(scope='module')
def elder():
    """A server of its own: what other tests share survives no earlier dockhand."""
    with fresh_servers('-elder', 'none') as (server,):
        server.prepare()
        yield server

def test_real_what_an_earlier_dockhand_deployed_goes_on_with_this_one(earlier, elder):
    elder.disconnect('main', 'other')
    elder.ok(WIPE)
    elder.ok('mkdir -p /root/elder && cat >/root/elder/dockhand.py && '
             '/usr/bin/python3 /root/elder/dockhand.py install', stdin=earlier)
    elder.connect()
    elder.ok('dockhand upload-key other elder', stdin=public_key(elder, 'other'))
    app = App(elder, 'elder', 8100)
    first = deploy_early(app, web_files('elder', 8100))
    app.commit({'upstart.conf': 'x\n'})
    assert app.push().status != 0
    app.follow()
    deploy_early(app, {'www/index.html': 'two'})
    last, container = deploy_early(app, {'www/index.html': 'three'}), app.container()

    elder.ok('/usr/bin/python3 /root/dockhand/dockhand.py install')
    elder.disconnect('main', 'other')
    for alias in ('main', 'other'):
        elder.open_connection(alias)
    assert elder.ok('dockhand doctor') == 'all is well'
    elder.ok('dockhand recover')
    assert (app.answer(), app.container()) == ('three', container)
    assert re.match(r'elder +running +%s ' % last[:10], elder.ok('dockhand apps'))
    said = elder.ok('dockhand releases elder')
    assert dict(re.findall(r'(?m)^ *(\d+) .*  (live|kept|failed|under way)\b', said)) == {
        '1': 'kept', '2': 'failed', '3': 'kept', '4': 'live'}, said

    elder.ok('dockhand rollback elder 1')
    assert (app.answer(), app.branch()) == ('elder', first)
    elder.ok('dockhand rollback elder')
    assert (app.answer(), app.branch()) == ('three', last)
    app.change('four')
    assert elder.ok('docker images -q elder | sort -u | wc -l') == '4'

    other = App(elder, 'elder', 8100, alias='other')
    other.follow()
    other.change('with the other key')
    assert 'has no right to shop' in elder.git('ls-remote', 'other:shop.git').err
    assert re.findall(r'(?m)^(\S+) .* (\S+)$', elder.ok('dockhand keys')) == [
        ('main', 'app'), ('other', 'elder')]

# ---- Pushes ----------------------------------------------------------------------------

@everywhere
def test_real_the_apache_of_2014_is_pushed_changed_and_pushed_again(server):
    app = server.apache()
    assert re.search('-----> .*docker.*: -rm', app.first_push.err), app.first_push.err
    assert server.get('whatever.test') == 'It works'
    for text in ('It still works', 'It works'):
        app.deploy({'www/index.html': text})
        assert server.get('whatever.test') == text

@everywhere
def test_real_a_service_that_ignores_sigterm_is_replaced(server):
    app = App(server, 'stubborn', 8090)
    app.deploy(web_files('stubborn', 8090, options='--rm'))
    first = app.container()
    app.change('two')
    assert app.container() != first and len(app.container().split()) == 1

@everywhere
def test_real_a_mail_like_service_is_reached_from_outside(server):
    app = App(server, 'mail-in')
    files = {'Dockerfile': 'FROM tiny:1\nCOPY greet /greet\n'
                           'CMD ["nc", "-ll", "-p", "25", "-e", "cat", "/greet"]\n',
             'upstart.conf': 'start on started docker\nstop on stopping docker\nrespawn\n'
                             'exec docker run --rm --init -p 2525:25 mail-in\n'}
    for greeting in ('220 one', '220 two'):
        app.deploy(dict(files, greet=greeting))
        assert server.hear(2525, '') == greeting
    assert server.run('ls', '/etc/nginx/conf.d/mail-in.conf').status != 0

@anywhere
def test_real_a_clone_and_a_fetch_get_what_was_pushed(server):
    app, copy = server.app('shop'), App(server, 'shop')
    copy.follow()
    assert copy.git('rev-parse', 'HEAD') == app.branch()
    copy.git('clone', '-q', copy.remote, 'clone')
    assert sorted(os.listdir(copy.folder + '/clone')) == sorted(os.listdir(app.folder))

@anywhere
def test_real_a_push_from_a_shallow_clone_deploys(server):
    server.app('shop').change('before the clone')
    shallow = App(server, 'shop')
    shallow.git('fetch', '-q', '--depth', '1', shallow.remote, 'main')
    shallow.git('reset', '-q', '--hard', 'FETCH_HEAD')
    assert shallow.git('rev-list', '--count', 'HEAD') == '1'
    shallow.change('from a shallow clone')

def look_at(server, app):
    """All that a push changes."""
    return (app.answer(), app.branch(), server.ok('dockhand apps'),
            server.ok('docker ps -q'), server.ok('docker images -q --no-trunc | sort -u'),
            server.manifest('/etc/nginx', '/var/lib/dockhand'))

@anywhere
def test_real_a_tag_is_stored_and_deploys_nothing(server):
    app = server.app('shop')
    before = look_at(server, app)
    app.git('tag', '-f', 'v1')
    pushed = app.push('v1')
    assert pushed.status == 0, pushed.err
    assert look_at(server, app) == before
    assert server.git('ls-remote', app.remote, 'v1').out

@anywhere
def test_real_a_plan_shows_the_difference_and_changes_nothing(server):
    app = server.app('shop')
    before = look_at(server, app)
    app.commit({'nginx-proxy.conf': web_files(
        'shop', app.port)['nginx-proxy.conf'].replace(
        'listen 80;', 'listen 80;\n    gzip on;')})
    pushed = app.push('main:plan')
    check_refusal(pushed, 'this was a plan')
    assert any('+    gzip on;' in line for line in pushed.out), pushed.err
    assert look_at(server, app) == before
    assert app.branch('plan') == ''

@anywhere
def test_real_what_is_export_ignore_is_built_all_the_same(server):
    """.gitattributes would keep it from git archive."""
    app = server.app('shop')
    app.deploy({'.gitattributes': 'www export-ignore\nDockerfile export-ignore\n'})
    app.change('exported all the same')

@everywhere
def test_real_an_app_with_a_healthcheck_waits_for_it(server):
    check = 'HEALTHCHECK --interval=1s --retries=%d CMD ["cat", "/www/ready"]\n'
    late = 'CMD ["sh", "-c", "(sleep 3; echo yes >/www/ready) & exec httpd -f -h /www"]\n'
    app = App(server, 'healthy', 8091)
    app.deploy(dict(web_files('healthy', 8091), Dockerfile=REAL_WEB + check % 30 + late))
    assert server.inside(app, '{{.State.Health.Status}}') == 'healthy'
    refused(app,
            {'Dockerfile': REAL_WEB + check % 2 + 'CMD ["httpd", "-f", "-h", "/www"]\n'},
            'HEALTHCHECK says unhealthy', 1)

@anywhere
def test_real_line_ends_of_windows_are_no_mistake(server):
    app = App(server, 'crlf', 8095)
    app.deploy(dict((name, text.replace('\n', '\r\n'))
                    for name, text in web_files('crlf', 8095).items()))
    assert app.answer() == 'crlf'

# ---- Refusals --------------------------------------------------------------------------

def check_refusal(pushed, pattern):
    """One line of dockhand's, the last one, says why."""
    assert pushed.status != 0, pushed.err
    said = [line for line in pushed.out if line.startswith('dockhand: ')]
    assert len(said) == 1 and pushed.out[-1] == said[0], pushed.err
    assert re.search(pattern, said[0]), pushed.err

def refused(app, files, pattern, times=2):
    """A push is refused and the old version answers, twice."""
    before = app.answer(), app.branch()
    app.commit(files)
    for _ in range(times):
        pushed = app.push()
        check_refusal(pushed, pattern)
        assert (app.answer(), app.branch()) == before
    app.follow()
    return pushed

@anywhere
def test_real_a_dockerfile_that_fails_is_refused(server):
    refused(server.app('shop'), {'Dockerfile': 'FROM tiny:1\nRUN false\n'},
            'build failed')

@everywhere
def test_real_a_job_that_dies_at_once_is_refused_and_its_log_shown(server):
    pushed = refused(server.app('shop'), {
        'Dockerfile': 'FROM tiny:1\nCMD ["sh", "-c", "echo no database; exit 3"]\n'},
        'failed its health check')
    assert any('no database' in line for line in pushed.out), pushed.err

def test_real_an_app_that_never_listens_is_refused_when_its_time_is_over(servers):
    server = servers['upstart']
    app = server.app('shop')
    server.ok('dockhand config shop timeout=5')
    try:
        refused(app, {'Dockerfile': 'FROM tiny:1\nCMD ["sleep", "9999"]\n'},
                'after 5 s nothing listens on port 80', 1)
    finally:
        server.ok('dockhand config shop --unset timeout')

@anywhere
def test_real_a_proxy_file_that_breaks_or_takes_something_is_refused(server):
    server.apache()
    server.app('basket', **{
        'nginx-proxy.conf': 'server { listen 80; server_name basket.test b.shop.test; '
                            'return 200 basket; }\n'})
    for text, pattern in (
            ('server {', r'nginx-proxy\.conf:\d+: '),
            ('server { listen 80; server_name a.test; bogus on; }', r'conf:1: .*bogus'),
            ('server { listen 80 default_server; }', 'taken .*apache-example.conf'),
            ('server { listen 80; server_name a.test b.shop.test; }',
             r'b\.shop\.test.* taken .*basket\.conf'),
            ('server { listen 80; }', r'conf:1: no request reaches')):
        refused(server.app('shop'), {'nginx-proxy.conf': text + '\n'}, pattern)

@anywhere
def test_real_a_proxy_file_that_was_edited_on_the_server_is_not_overwritten(server):
    app, path = server.app('shop'), '/etc/nginx/conf.d/shop.conf'
    server.ok("sed -i 's/listen 80;/listen 80; gzip on;/' " + path)
    edited = server.ok('cat ' + path)
    refused(app,
            {'nginx-proxy.conf': web_files('shop', app.port)['nginx-proxy.conf'] + '\n'},
            'to keep that, commit it in nginx-proxy.conf.* sudo rm ' + path)
    assert server.ok('cat ' + path) == edited
    server.ok('rm ' + path)
    app.change('after the edit')

@everywhere
def test_real_a_name_that_the_server_has_already_is_refused(server):
    app = App(server, 'legacy')
    app.commit(web_files('legacy', 8092))
    for make, unmake, pattern in (
            ('echo "# mine" >/etc/nginx/conf.d/legacy.conf',
             'rm /etc/nginx/conf.d/legacy.conf', 'conf.d/legacy.conf'),
            ('mkdir -p /etc/init; echo exec sleep 9 >/etc/init/legacy.conf',
             'rm /etc/init/legacy.conf; rmdir /etc/init || :', '/etc/init/legacy.conf'),
            ('echo >/etc/init.d/legacy', 'rm /etc/init.d/legacy', 'init.d/legacy'),
            ('docker tag tiny:1 legacy:latest', 'docker rmi legacy:latest',
             'legacy:latest'),
            ('docker tag tiny:1 legacy:1', 'docker rmi legacy:1', 'legacy:1')):
        server.ok(make)
        try:
            for _ in range(2):
                outcome = app.push()
                assert outcome.status != 0, make
                assert re.search('dockhand: .*' + pattern, outcome.err), outcome.err
            assert app.branch() == ''
        finally:
            server.ok(unmake)
            server.dockhand('destroy', 'legacy', '--force')

@pytest.mark.parametrize('words, pattern', [
    ([':main'], 'dockhand: branches are not deleted'),
    (['main:feature'], 'dockhand: only main is deployed.*git push REMOTE HEAD:main'),
    (['main:refs/heads/$(id)'], 'dockhand: only main is deployed'),
    (['main:refs/heads/;id'], 'dockhand: only main is deployed'),
    (['main:refs/heads/--upload-pack=x'], 'dockhand: only main is deployed'),
    (['main:refs/for/master'], 'dockhand: .*push a branch or a tag'),
    (['main:refs/replace/' + 'a' * 40], 'dockhand: .*push a branch or a tag'),
    (['main:refs/dockhand/1'], 'deny updating a hidden ref|push a branch or a tag'),
    (['--all'], 'dockhand: only main is deployed'),
    (['--mirror'], 'dockhand: only main is deployed')])
def test_real_any_other_ref_is_refused(servers, words, pattern):
    app = servers['none'].app('shop')
    app.git('branch', '-f', 'other')
    before = app.answer(), servers['none'].git('ls-remote', app.remote).out
    for _ in range(2):
        pushed = app.push(*words)
        assert pushed.status != 0 and re.search(pattern, pushed.err), pushed.err
    listed = servers['none'].git('ls-remote', app.remote).out
    assert before == (app.answer(), listed) or words == ['--mirror']
    assert 'other' not in listed and app.branch() == app.git('rev-parse', 'main')

# ---- One app ends where the next begins ------------------------------------------------

NEIGHBOUR = {'nginx-proxy.conf': UPGRADE +
             '\nserver { listen 80; server_name market.test '
             'market.*; add_header X-Up $up; return 200 market; }\n'}

REACHES = [
    ('server { listen 80 proxy_protocol; server_name a.test; }',
     '`listen 80`.*`proxy_protocol`'),
    ('server { listen 80 http2; server_name a.test; }', '`listen 80`.*`http2`'),
    ('server { listen [::]:80 proxy_protocol; listen 80; server_name a.test; }',
     'proxy_protocol'),
    ('server { listen 80 backlog=9; server_name a.test; }', 'backlog=9'),
    ('server { listen 0080; server_name market.test; }',
     'server_name "market.test" is taken'),
    ('server { listen 80 default_server; ssl ON; }', '`ssl ON`: write `listen 443 ssl;`'),
    ('server { listen 443 ssl; server_name a.test; ssl_certificate_key engine:/x.so:y; }',
     'write the path of a file'),
    ('server { listen 443 ssl; server_name a.test; ssl_certificate /proc/kmsg; }',
     'this is no place for files'),
    ('map $uri $UP { default stolen; }\nserver { server_name a.test; }',
     'market has a variable of this name'),
    ('auth_basic "x"; auth_basic_user_file /etc/passwd;\nserver { server_name a.test; }',
     'conf:1: `auth_basic x`.*holds for every app'),
    ('deny all;\nserver { server_name a.test; }',
     'conf:1: `deny all`.*holds for every app'),
    ('limit_rate 1;\nserver { server_name a.test; }', 'conf:1: `limit_rate 1`'),
    ('map $uri $up { default stolen; }\nserver { server_name a.test; }',
     'conf:1: `map \\$uri`: market has a variable of this name'),
    ('map $uri $args { default stolen; }\nserver { server_name a.test; }',
     'a variable of nginx'),
    ('server { server_name a.test; location ~ "^/(?<up>x)" { return 200; } }',
     'captures \\$up'),
    ('server { server_name shop.test market.example.com; }',
     '"market.example.com" would take '
     'requests from market, which has "market.\\*"'),
    ('server { server_name *.example.com; }',
     '"\\*.example.com" would take requests from '),
    ('server { listen 443 ssl; server_name market.test; ssl_certificate /x; }',
     'server_name "market.test" is taken'),
    ('server { server_name ~^market; }', '"~\\^market" would take requests from market'),
    ('server { set $x a}; server_name market.*; }', 'put what holds'),
    ('server { set $x a\x0b#; server_name market.*; }', 'a control character'),
    ('server { server_name a.test; include /var/lib/dockhand/apps/market/live/env; }',
     '`include`: it is not read here'),
    ('server { server_name a.test; client_body_temp_path /etc/made; }',
     'may name files with'),
    ('server { server_name a.test; error_log /etc/made.log; }',
     'its place is /var/log/nginx/shop'),
    ('server { server_name a.test; access_log /etc/made.log; }', 'its place is'),
    ('proxy_cache_path /etc/made keys_zone=a:1m;\nserver { server_name a.test; }',
     'its place is')]

@pytest.mark.parametrize('text, pattern', one_in(3, REACHES),
                         ids=[row[1][:24] for row in REACHES])
def test_real_a_file_that_reaches_past_its_own_app_is_refused_and_leaves_nothing(
        servers, text, pattern):
    """nginx takes each of them."""
    server = servers['systemd']
    app, market = server.app('shop'), server.app('market', **NEIGHBOUR)
    server.ok('dockhand config market SECRET=hidden')
    before = server.manifest('/etc', '/var/log/nginx', '/var/lib/nginx', '/var/cache')
    app.commit({'nginx-proxy.conf': text + '\n'})
    for words in ((), ('HEAD:plan',)):
        pushed = app.push(*words)
        check_refusal(pushed, pattern)
        assert 'hidden' not in pushed.err
    app.follow()
    after = server.manifest('/etc', '/var/lib/nginx', '/var/cache')
    assert [line for line in after if line not in before] == []
    assert market.answer() == 'market'

def test_real_a_release_that_closes_another_app_is_put_back(servers):
    """One that was live before there was a rule against that: it is noticed by asking."""
    server = servers['systemd']
    app, closed = server.app('shop'), server.app('bpx')
    number = os.path.basename(server.ok('readlink /var/lib/dockhand/apps/shop/live'))
    app.change('the next one')
    record = '/var/lib/dockhand/apps/shop/releases/%s/nginx-proxy.conf' % number
    server.ok("sed -i 's/listen 80;/listen 80 proxy_protocol;/' " + record)
    told = server.dockhand('rollback', 'shop', number)
    assert told.status == 1 and 'Note: nginx-proxy.conf:2: `listen 80`' in told.err, told
    assert 'another app answers nothing instead of 200' in told.err
    assert (app.answer(), closed.answer()) == ('the next one', 'bpx')
    server.ok("sed -i 's/ proxy_protocol//' %s; dockhand rollback shop %s" %
              (record, number))

def test_real_the_files_that_people_write_are_taken(servers):
    server = servers['systemd']
    app = server.app('shop')
    server.app('market', **NEIGHBOUR)
    proxy = '''%s
limit_req_zone $binary_remote_addr zone=shop_rate:1m rate=100r/s;
proxy_cache_path /var/cache/nginx/shop levels=1:2 keys_zone=shop:1m;
log_format shop '$status $request_time';
server {
    listen 80;
    listen [::]:80 ipv6only=on;
    server_name shop.test www.shop.test;
    access_log /var/log/nginx/shop.log shop;
    error_log /var/log/nginx/shop-errors.log;
    root /srv;
    location ~ "^/(?<shop_page>[0-9]{3})$" { return 200 $shop_page; }
    location / {
        limit_req zone=shop_rate burst=20;
        include proxy_params;
        proxy_cache shop;
        proxy_set_header Connection $up;
        proxy_pass http://127.0.0.1:%d;
    }
}
''' % (UPGRADE, app.port)
    app.deploy({'nginx-proxy.conf': proxy, 'www/index.html': 'all of it'})
    assert app.answer() == 'all of it'
    assert 'all is well' in server.ok('dockhand doctor')
    app.deploy(dict(web_files('shop', app.port), **{'www/index.html': 'as before'}))

DIFFERENCES = r'''
import os, random, subprocess, sys, tempfile
sys.path.insert(0, '/usr/local/lib/dockhand')
import dockhand
PIECES = """{ } ; # " ' \\ $ ( ) ${ ${x} $x \\} \\" a"b 'x' "y" server_name~shop.test;
    shop.test server{ return~200; set~$v~1; location~/{ }# #{ if($v){ \\; \\n "~"
    )x""".split()
PIECES += ['\x0b', '\x0c']
SEEDS = [
    'server { listen 80; server_name a.test; set $x a; return 200 "b"; }\n',
    'server {\n listen 80;\n server_name "a.test" shop.test;\n'
    ' location / { set $x "q"; return 200; }\n}\n',
    'server { listen 80; server_name a.test; } # shop.test;\n'
    'server { server_name shop.test; }\n']

def mutant(rng):
    text = rng.choice(SEEDS)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text) + 1)
        if rng.random() < .2:
            text = text[:at] + text[at + rng.randint(1, 3):]
        else:
            piece = rng.choice(PIECES).replace('~', ' ')
            before, after = rng.choice(['', ' ', '\n']), rng.choice(['', ' ', '\n'])
            text = text[:at] + before + piece + after + text[at:]
    return text

rng, folder = random.Random(int(sys.argv[1])), tempfile.mkdtemp()
conf = os.path.join(folder, 'nginx.conf')
found = {'taken': 0, 'named': 0, 'refused': 0, 'wrong': []}
for _ in range(int(sys.argv[2])):
    text = mutant(rng)
    with open(conf, 'w') as target:
        target.write('pid %s/pid; error_log stderr; events {} http { access_log off;\n'
            'server { listen 80; server_name first; }\n%s\n'
            'server { listen 80; server_name shop.test; } }\n' % (folder, text))
    said = subprocess.run(['nginx', '-t', '-c', conf], stderr=subprocess.PIPE)
    if said.returncode:
        continue
    named = b'conflicting server name "shop.test" on 0.0.0.0:80' in said.stderr
    reader = dockhand.NginxReader(text)
    found['taken'] += 1
    found['named'] += named
    found['refused'] += bool(reader.troubles)
    ours = any('shop.test' in server.names
               for server in dockhand.servers_in(reader.directives, 'x')
               if any(listen.port == '80' for listen in server.listens))
    if not reader.troubles and ours != named:
        found['wrong'].append(text)
print(found)
'''

@anywhere
def test_real_names_are_read_as_this_servers_nginx_reads_them(server):
    """Of the mutants of some files that nginx takes, each is read with the same name, or
    would be refused."""
    script = server.run('python3', '-', '7', '1500', stdin=DIFFERENCES)
    found = eval(script.out)
    print(server.kind, found)
    assert found['wrong'] == [] and found['taken'] > 100 and found['named'] > 20

def test_real_a_key_is_told_the_host_name_alone_of_an_app_it_has_no_right_to(servers):
    server = servers['systemd']
    server.app('market', **NEIGHBOUR)
    other = public_key(server, 'other')
    server.disconnect('other')
    server.ok('dockhand upload-key other bp', stdin=other)
    server.open_connection('other')
    try:
        app = App(server, 'bp', 8073, alias='other')
        for name in ('market.test', 'market.org', 'market.test market.org'):
            app.commit(dict(web_files('bp', 8073), **{
                'nginx-proxy.conf': 'server { server_name %s; }' % name}))
            pushed = app.push()
            check_refusal(pushed, 'market')
            assert 'market.conf' not in pushed.err and 'market.*' not in pushed.err
    finally:
        server.ok('dockhand destroy bp --force; dockhand upload-key other', stdin=other)
        server.open_connection('other')

def test_real_root_takes_a_full_name_out_of_a_wildcard_and_a_pushed_file_does_not(
        servers):
    server = servers['systemd']
    server.app('market', **NEIGHBOUR)
    app = App(server, 'taker')
    app.deploy({'Dockerfile': REAL_WEB + 'EXPOSE 80\nCMD ["httpd", "-f", "-h", "/www"]\n',
                'www/index.html': 'taken'})
    assert server.get('market.example.com') == 'market'
    refused(app, {'nginx-proxy.conf': 'server { listen 80; server_name taker.test '
                  'market.example.com; location / { proxy_pass http://taker; } }\n'},
            'would take requests from market.*ssh git@HOST config market domains=')
    said = server.run('dockhand', 'config', 'taker',
                      'domains=taker.test market.example.com')
    assert said.status == 0 and 'market.example.com' in said.err, said
    assert until(lambda: server.get('market.example.com'), 'taken') == 'taken'
    app.change('pushed')
    assert server.get('market.example.com') == 'pushed'
    server.ok('dockhand destroy taker --force')

def test_real_an_app_with_a_dot_is_no_host_name_for_another(servers):
    server = servers['systemd']
    service = ('FROM tiny:1\nCOPY www /www\nEXPOSE 5432\n'
               'CMD ["httpd", "-f", "-p", "5432", "-h", "/www"]\n')
    for name in ('api.example.com', 'inside'):
        App(server, name).deploy({'Dockerfile': service, 'www/index.html': name})
    asks = 'docker run --rm --net dockhand tiny:1 busybox nslookup %s 127.0.0.11 || :'
    assert '10.86.' in server.ok(asks % 'inside')
    assert '10.86.' not in server.ok(asks % 'api.example.com')
    job = web_files('shop', 8094)['upstart.conf'].replace(
        '--rm', '--rm --net dockhand --net-alias inside')
    refused(server.app('shop'), {'upstart.conf': job},
            'only the app inside answers to that')
    server.ok('dockhand destroy inside --force; dockhand destroy api.example.com --force')

# ---- A push ends as git will end it ----------------------------------------------------

@anywhere
def test_real_what_is_no_commit_is_refused_and_the_app_takes_the_next_push(server):
    app = server.app('shop')
    before = app.answer()
    app.git('tag', '-f', '-a', '-m', 'v', 'v1.0')
    app.git('tag', '-f', '-a', '-m', 'v', 'v2.0', 'v1.0')
    for name, words in (('v1.0:refs/heads/main',
                         r'push REMOTE v1\.0\^\{\}:refs/heads/main'),
                        ('v2.0:refs/heads/main', r'v2\.0\^\{\}:'),
                        ('+HEAD^{tree}:refs/heads/main', 'a tree is no commit'),
                        ('+HEAD:www/index.html:refs/heads/main', 'a blob is no commit')):
        source, _, target = name.rpartition(':')
        identity = app.git('rev-parse', source.lstrip('+'))
        app.commit({'www/index.html': 'new'})
        pushed = app.push('+%s:%s' % (identity, target))
        check_refusal(pushed, words)
        assert app.answer() == before
        app.follow()
    app.change('%s goes on' % server.kind)

def test_real_a_first_push_of_a_tag_is_refused_and_the_branch_is_then_pushed(servers):
    server = servers['systemd']
    app = App(server, 'tagged', 8071)
    app.commit(web_files('tagged', 8071))
    app.git('tag', '-a', '-m', 'v', '1.0.0')
    check_refusal(app.push('1.0.0:refs/heads/main'), r'1\.0\.0\^\{\}:refs/heads/main')
    check_refusal(app.push('1.0.0:master'),
                  'make a tag called master, which deploys nothing')
    assert 'tagged           waiting  for its first push' in server.ok('dockhand apps')
    assert app.push('1.0.0^{}:refs/heads/main').status == 0
    assert app.answer() == 'tagged'
    server.ok('dockhand destroy tagged --force')

def test_real_a_repository_with_sha256_ids_leaves_nothing_behind(servers):
    server = servers['systemd']
    app = App(server, 'longer')
    shutil.rmtree(os.path.join(app.folder, '.git'))
    app.git('init', '-q', '--object-format=sha256', '-b', 'main')
    app.commit({'Dockerfile': 'FROM tiny:1\n'})
    pushed = server.git('push', app.remote, 'main', cwd=app.folder)
    assert pushed.status != 0
    gone = until(lambda: server.run('ls', '/home/git/longer.git').status != 0, True)
    assert gone and 'longer' not in server.ok('dockhand apps')

@everywhere
def test_real_an_app_that_never_went_live_is_listed_with_the_reason(server):
    app = App(server, 'stillborn', 8072)
    app.commit(dict(web_files('stillborn', 8072), Dockerfile='FROM tiny:1\nRUN false\n'))
    check_refusal(app.push(), 'the build failed')
    assert re.search('(?m)^stillborn +waiting +for a push that succeeds; '
                     'the last one: the build failed', server.ok('dockhand apps'))
    assert 'failed: the build failed' in server.ok('dockhand releases stillborn')
    logs = server.dockhand('logs', 'stillborn')
    assert logs.status == 1 and 'was never live' in logs.err
    assert 'the build failed' in logs.err
    app.deploy({'Dockerfile': web_files('stillborn', 8072)['Dockerfile']})
    assert app.answer() == 'stillborn'
    server.ok('dockhand destroy stillborn --force')
    assert 'stillborn' not in server.ok('dockhand apps')

# ---- Whatever else happens -------------------------------------------------------------

@everywhere
def test_real_a_killed_container_comes_back(server):
    """Where docker keeps it running, `docker kill` counts as a person's stop."""
    app = server.app('survivor')
    server.ok('docker kill ' + app.container() if server.kind == 'upstart' else
              'kill -9 ' + server.inside(app, '{{.State.Pid}}'))
    assert until(app.answer, 'survivor') == 'survivor'

def test_real_a_killed_docker_client_does_no_harm(servers):
    """Upstart starts another, which finds the port taken by the container left behind."""
    server = servers['upstart']
    app = server.app('survivor')
    server.ok('kill -9 ' +
              re.search(r'process (\d+)', server.ok('status survivor')).group(1))
    assert until(app.answer, 'survivor') == 'survivor'
    app.change('survived')
    app.change('survivor')
    assert 'start/running' in server.ok('status survivor')
    assert len(app.container().split()) == 1

# What commands answer, and how logs come to be: measured on a real Upstart 1.5, but for
# what is said of a spoilt file, and of a restart without one, which its source says.
MEASURED = r'''
cd /etc/init && exec 2>&1
ask() { "$@"; echo "$1 $?"; }
write() { printf 'console none\nexec sleep %d\n' "$1" >gauge.conf; }
write 600; ask start gauge; ask start gauge; ask stop gauge; ask stop gauge; ask restart gauge
ask start gauge; rm gauge.conf
ask status gauge; ask restart gauge; ask stop gauge; ask status gauge
write 600; start gauge; echo bogus >>gauge.conf; ask status gauge; ask stop gauge; ask start gauge
write 600; start gauge; rm gauge.conf; write 601; ask stop gauge; ask start gauge; ask stop gauge
printf 'script\nsleep 1\necho one >&2\nprintf two\nend script\n' >gauge.conf
for _ in 1 2; do
    start -n gauge >/dev/null; ls /var/log/upstart/gauge.log
    while status gauge | grep -q start/; do sleep 0.1; done
    cat -A /var/log/upstart/gauge.log; echo
done
stat -c '%a %U' /var/log/upstart/gauge.log; rm gauge.conf /var/log/upstart/gauge.log'''
GAUGE_RUNS = 'gauge start/running, process N\n'
NO_SUCH_METHOD = (
    'stop: Method "Get" with signature "ss" on interface '
    '"org.freedesktop.DBus.Properties" ' "doesn't exist\nstop 1\n")
ANSWERS = GAUGE_RUNS + '''start 0
start: Job is already running: gauge
start 1
gauge stop/waiting
stop 0
stop: Unknown instance:\x20
stop 1
restart: Unknown instance:\x20
restart 1
''' + ''.join(GAUGE_RUNS + word + ' 0\n' for word in ('start', 'status', 'restart')) + (
    NO_SUCH_METHOD) + '''\
status: Unknown job: gauge
status 1
''' + GAUGE_RUNS * 2 + 'status 0\n' + NO_SUCH_METHOD + '''start: Unknown job: gauge
start 1
''' + GAUGE_RUNS + '''gauge stop/waiting
stop 0
''' + GAUGE_RUNS + '''start 0
gauge stop/waiting
stop 0
ls: cannot access '/var/log/upstart/gauge.log': No such file or directory
one^M$
two
/var/log/upstart/gauge.log
one^M$
twoone^M$
two
640 root'''

def test_real_the_double_of_upstart_answers_as_upstart_does(servers):
    said = servers['upstart'].ok(MEASURED)
    assert re.sub(r'process \d+', 'process N', said).splitlines() == ANSWERS.splitlines()

# What holds a container's name, and how it came to that: its client was killed while it
# ran, or before that; it ended, and no client was there to remove it (before 1.13).
LEFT = [
    "kill -9 $(status orphan | sed 's/.*process //')",
    'stop orphan; docker create --name orphan orphan; start orphan',
    'stop orphan; docker run --name orphan orphan true; start orphan']

def look_at_job(server, name):
    """The state of a job, without numbers, and how many containers its image has."""
    state = server.ok('status ' + name).split(',')[0]
    containers = server.ok('docker ps -aq --filter ancestor=%s:latest' % name).split()
    return state, len(containers)

@pytest.mark.parametrize('harm, command', [
    (LEFT[0], 'recover'), (LEFT[0], 'restart orphan'), (LEFT[1], 'recover'),
    (LEFT[2], 'start orphan'), (LEFT[2], 'recover')],
    ids=['running-recover', 'running-restart', 'created-recover', 'ended-start',
         'ended-recover'])
def test_real_an_app_comes_back_though_its_name_is_held_by_a_container(
        servers, harm, command):
    """Upstart gave up: each client it started ended at once, and so would the next."""
    server = servers['upstart']
    app = server.app('orphan', '--rm --init --name orphan')
    assert until(lambda: look_at_job(server, 'orphan'), ('orphan start/running', 1)) == (
        'orphan start/running', 1)
    server.ok(harm)
    given_up = 'orphan stop/waiting', 1
    assert until(lambda: look_at_job(server, 'orphan'), given_up) == given_up
    left = server.ok('docker ps -aq --no-trunc --filter name=^/orphan$')
    try:
        server.ok('dockhand ' + command)
        assert until(app.answer, 'orphan') == 'orphan'
        time.sleep(3)                       # longer than all respawns take
        assert look_at_job(server, 'orphan') == ('orphan start/running', 1)
        assert app.container() not in ('', left)
    finally:
        server.run('sh', '-c', 'docker rm -f orphan; dockhand start orphan')

def test_real_an_app_is_started_whose_job_is_started_for_ever_beside_an_orphan(servers):
    """Nothing holds its name, and docker takes so long to find its port taken, or the job
    so many trials, that init never gives up."""
    server = servers['upstart']
    app = server.app('restless', stanzas=STANZAS + 'respawn limit unlimited\n')
    left = app.container()
    server.ok("kill -9 $(status restless | sed 's/.*process //')")
    refused = 'grep -c "docker: Error" /var/log/upstart/restless.log || :'
    assert until(lambda: int(server.ok(refused) or 0) > 3, True)
    server.ok('dockhand start restless')
    assert app.answer() == 'restless'
    assert look_at_job(server, 'restless')[0] == 'restless start/running'
    running = app.container().split()   # a client that was ended may leave one created
    assert len(running) == 1 and running != [left]

# Of which jobs one is to run again that was down: what each says of its start.
NEVER = ['stop on stopping docker\nrespawn\n',
         'start on started docker\nmanual\nrespawn\n']
LOST = ['start on filesystem and started docker\nstop on runlevel [!2345]\nrespawn\n',
        'start on runlevel [2345]\nrespawn\n']

@drill('upstart')
def test_real_jobs_that_are_lost_while_docker_is_away_run_again(server, size):
    """Their events come again with the next boot only; recover runs with docker's."""
    lost = [server.app('lost%d' % number, stanzas=each)
            for number, each in enumerate(LOST)]
    quiet = server.app('hushed', stanzas=LOST[0])
    never = [server.app('never%d' % number, stanzas=each)
             for number, each in enumerate(NEVER)]
    server.ok('dockhand stop hushed')
    server.ok('stop docker; sleep 12')
    states = server.ok('status lost0; status lost1').splitlines()
    server.ok('start docker')
    assert states == ['lost0 stop/waiting', 'lost1 stop/waiting']
    for app in lost:
        assert until(app.answer, app.name, 20) == app.name
    server.ok('dockhand recover')
    assert [app.answer() for app in lost + [quiet] + never] == [
        'lost0', 'lost1', '502', '502', '502']
    for app in [quiet] + never:
        assert look_at_job(server, app.name) == (app.name + ' stop/waiting', 0)
        server.ok('dockhand start ' + app.name)
        assert app.answer() == app.name
    for app in lost + [quiet] + never:
        server.ok('dockhand destroy %s --force' % app.name)

@drill('upstart')
def test_real_recover_runs_a_job_that_ended_and_that_nobody_stopped(server, size):
    run_again_that_ended(server, 'start on started docker\n')
    run_again_that_ended(server, 'start on filesystem\nrespawn\nrespawn limit 1 60\n')

def run_again_that_ended(server, stanzas):
    name = 'ended%d' % len(stanzas)
    app, down = server.app(name, stanzas=stanzas), (name + ' stop/waiting', 0)

    def strike():
        server.ok('docker ps -q --filter ancestor=$1:latest | xargs -r docker kill', name)
        return look_at_job(server, name)
    assert until(strike, down, pause=1) == down
    for _ in range(2):
        server.ok('dockhand recover')
        assert until(app.answer, name) == name
    assert look_at_job(server, name) == (name + ' start/running', 1)
    server.ok('dockhand stop %s && dockhand recover' % name)
    assert look_at_job(server, name) == down
    server.ok('dockhand destroy %s --force' % name)

# A running job whose file is gone, or is no job any more, goes on; `stop` stops it, and
# fails.
GONE, SPOILT = 'rm /etc/init/%s.conf', 'echo bogus >>/etc/init/%s.conf'
HARMS = pytest.mark.parametrize('harm', [GONE, SPOILT], ids=['gone', 'spoilt'])

def unfiled(server, harm, name='unfiled'):
    """An app that runs, and of whose job's file init knows no more."""
    app = server.app(name)
    server.ok('dockhand start %s && %s' % (name, harm % name))
    assert look_at_job(server, name) == (name + ' start/running', 1)
    return app

def check_unfiled(app, answer):
    """It runs as if nothing had been, and init knows its job again."""
    assert app.answer() == answer
    assert look_at_job(app.server, app.name) == (app.name + ' start/running', 1)
    app.server.ok('ls /etc/init/%s.conf && ! ls /etc/init/%s.override' %
                  (app.name, app.name))

def test_real_a_push_goes_live_where_the_file_of_the_job_was_removed(servers):
    app = unfiled(servers['upstart'], GONE)
    app.deploy({'www/index.html': 'pushed'})
    check_unfiled(app, 'pushed')
    app.change('unfiled')

def test_real_a_push_goes_live_once_a_job_that_was_spoilt_by_hand_is_removed(servers):
    """As dockhand itself says."""
    app = unfiled(servers['upstart'], SPOILT)
    remove = GONE % app.name
    app.commit({'www/index.html': 'mended'})
    check_refusal(app.push(), 'to drop it: sudo ' + remove + ', and try again')
    app.server.ok(remove)
    pushed = app.push()
    assert pushed.status == 0, pushed.err
    check_unfiled(app, 'mended')
    app.change('unfiled')

@HARMS
def test_real_an_app_of_whose_job_there_is_no_file_is_restarted(servers, harm):
    app = unfiled(servers['upstart'], harm)
    before = app.container()
    app.server.ok('dockhand restart unfiled')
    check_unfiled(app, app.answer())
    assert app.container() not in ('', before)

def test_real_an_app_of_whose_job_there_is_no_file_is_rolled_back(servers):
    app = unfiled(servers['upstart'], 'ls /etc/init/%s.conf')
    answer = app.answer()
    app.change('another')
    app.server.ok(GONE % app.name + ' && dockhand rollback unfiled')
    check_unfiled(app, answer)

@HARMS
def test_real_an_app_of_whose_job_there_is_no_file_is_stopped(servers, harm):
    app = unfiled(servers['upstart'], harm)
    answer = app.answer()
    for command in ('stop unfiled', 'stop unfiled', 'recover'):
        app.server.ok('dockhand ' + command)
        assert app.answer() == '502' and app.container() == ''
    app.server.ok('dockhand start unfiled')
    check_unfiled(app, answer)

@HARMS
def test_real_an_app_of_whose_job_there_is_no_file_is_destroyed(servers, harm):
    server, name = servers['upstart'], 'unfiled-' + harm[:2]
    app = unfiled(server, harm, name)
    del server.apps[name]
    server.ok('dockhand destroy %s --force' % name)
    assert app.container() == '' and server.run('status', name).status == 1
    server.ok('! ls /etc/init/%s.conf' % name)

@everywhere
def test_real_apps_come_back_when_docker_is_restarted(server):
    app = server.app('survivor')
    server.restart_docker()
    assert until(app.answer, 'survivor', 60) == 'survivor'

def come_back_after(server, event):
    """Every app does, but for one that was stopped; a push starts that."""
    app, quiet = server.app('survivor'), server.app('quiet')
    server.apache()
    assert server.dockhand('stop', 'quiet').status == 0
    assert quiet.answer() == '502'
    event()
    assert until(app.answer, 'survivor', 60) == 'survivor'
    assert until(lambda: server.get('whatever.test'), 'It works', 60) == 'It works'
    assert quiet.answer() == '502'
    def others():                       # `changing` while recover looks at one
        lines = server.ok('dockhand apps').splitlines()
        return [line for line in lines if line.split()[1] not in ('running', 'waiting')]
    assert until(lambda: [line.split()[:2] for line in others()],
                 [['quiet', 'stopped']], 120) == [['quiet', 'stopped']], others()
    quiet.change(event.__name__)

@everywhere
def test_real_apps_come_back_after_a_reboot(server):
    come_back_after(server, server.reboot)

@everywhere
def test_real_apps_come_back_after_a_power_cut(server):
    come_back_after(server, server.cut_power)

@drill('sysvinit')
def test_real_an_interrupted_deploy_is_put_right_at_boot_by_sysvinit(server, size):
    """Debian's other init, which runs what is in /etc/init.d."""
    shop, plain = server.app('shop'), Plain(server, 'plain')
    for mark in 'ab':
        plain.release(mark)
    for app, release in ((shop, '$(readlink live)'), (plain, 'releases/1')):
        server.ok('cd /var/lib/dockhand/apps/%s && ln -s %s pending' % (app.name, release))
    server.reboot()
    links = 'cd /var/lib/dockhand/apps && ls -d */pending || :'
    assert until(lambda: server.ok(links), '', 60) == ''
    assert until(shop.answer, 'shop') == 'shop'
    plain.check_whole('b')
    assert server.ok('dockhand doctor') == 'all is well'
    return 'doctor: all is well'

def test_real_a_pusher_who_goes_away_leaves_one_whole_release(servers):
    server = servers['systemd']
    app = server.app('shop')
    commit = app.commit({'www/index.html': 'by nobody', 'Dockerfile': REAL_WEB.replace(
        'COPY', 'RUN sleep 4\nCOPY') + 'CMD ["httpd", "-f", "-h", "/www"]\n'})
    pusher, _ = app.hear('RUN sleep')
    os.killpg(pusher.pid, signal.SIGKILL)
    pusher.communicate()
    assert until(app.answer, 'by nobody') == 'by nobody'
    assert app.push().status == 0 and app.branch() == commit
    app.change('by somebody')

def test_real_a_push_while_docker_is_stopped_is_refused(servers):
    server = servers['systemd']
    app = server.app('shop')
    server.ok('systemctl stop docker.socket docker')
    try:
        app.commit({'www/index.html': 'never'})
        for _ in range(2):
            check_refusal(app.push(),
                          'docker does not answer|annot connect to the Docker')
    finally:
        server.ok('systemctl start docker.socket docker')
    server.app('shop').change('docker is back')

@everywhere
def test_real_a_configuration_of_nginx_that_was_broken_already_is_named(server):
    app = server.app('shop')
    server.ok('echo "bogus on;" >/etc/nginx/conf.d/elses.conf')
    try:
        refused(app, {'www/index.html': 'never'},
                r'configuration was broken before this push.*/elses\.conf:1: .*"\.\.\."')
    finally:
        server.ok('rm /etc/nginx/conf.d/elses.conf')

@everywhere
def test_real_nginx_is_started_by_a_push_where_it_does_not_run(server):
    app = server.app('shop')
    server.ok(STOP_NGINX[server.kind])
    app.deploy({'www/index.html': 'nginx is back', 'nginx-proxy.conf': web_files(
        'shop', app.port)['nginx-proxy.conf'] + '# %s\n' % time.time()})
    assert app.answer() == 'nginx is back'

# ---- A newcomer's road: what the README says is typed, and what it says comes ----------

def typed_in(title):
    """The pieces of text that the README has to be typed under a heading."""
    with io.open(os.path.join(HERE, 'README.md'), encoding='utf-8') as file:
        parts = file.read().partition('# %s\n' % title)[2].split('```\n')
    pieces = []
    for prose, piece in zip(parts[::2], parts[1::2]):
        if re.search('(?m)^#', prose):
            break
        pieces.append(str(piece))
    return pieces

def shown_in(title):
    """[(a command that is shown behind a `$`, the lines that it is said to print)]"""
    pieces = [piece for piece in typed_in(title) if piece.startswith('$ ')]
    return [(command.partition('\n')[0], command.partition('\n')[2].splitlines())
            for piece in pieces for command in re.split(r'(?m)^\$ ', piece)[1:]]

def shape(line):
    """A line without what differs each time: ids, times, sizes, and whose server it is."""
    line = re.sub(r'\b[0-9a-f]{10}\b', 'ID', line.replace('server.example.com', 'HOST'))
    line = re.sub(r'\d{4}-\d\d-\d\d \d\d:\d\d', 'DATE', line)
    line = re.sub(r'\d+(\.\d)? (MB|s|days)\b', r'SOME \2', line)
    return ' '.join(line.split())

def check_shown(lines, said):
    """What came is what is shown; `[...]` stands for any lines."""
    pattern = '\n'.join('(.+\n)*?.+' if 'remote: [...]' == shape(line) else
                        re.escape(shape(line)) for line in said)
    came = '\n'.join(shape(line) for line in lines.strip().splitlines())
    assert re.match(pattern + r'\Z', came), '%s\n\nshown:\n%s' % (came, '\n'.join(said))

class Laptop(object):
    """Where a newcomer types: its ssh, scp and curl find the server under the name HOST."""

    def __init__(self, server, folder):
        self.folder, self.cwd = folder, os.path.join(folder, 'clone')
        os.makedirs(os.path.join(folder, '.ssh'))
        os.makedirs(os.path.join(folder, 'bin'))
        os.mkdir(self.cwd)
        for name in ('dockhand.py', 'configure-system.sh'):
            with io.open(os.path.join(HERE, name), encoding='utf-8') as file:
                write(os.path.join(self.cwd, name), file.read())
        ports = [must(['docker', 'port', server.name, port]).rpartition(':')[2]
                 for port in ('22', '80')]
        config = os.path.join(folder, '.ssh', 'config')
        write(config, 'Host HOST\n  HostName 127.0.0.1\n  Port %s\n  IdentityFile %s\n'
              '  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n'
              '  LogLevel ERROR\n' % (ports[0], os.path.join(folder, '.ssh', 'id_ed25519')))
        for name, options in (('ssh', '-F ' + config), ('scp', '-F ' + config),
                              ('curl', '--connect-to ::127.0.0.1:' + ports[1])):
            path = os.path.join(folder, 'bin', name)
            real = [each for each in ('/usr/bin/', '/bin/') if os.path.exists(each + name)]
            write(path, '#!/bin/sh\nexec %s%s %s "$@"\n' % (real[0], name, options))
            os.chmod(path, 0o755)
        self.type("ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519\n"
                  'git config --global user.name Newcomer\n'
                  'git config --global user.email newcomer@example.com\n'
                  'git config --global init.defaultBranch main')
        server.ok('mkdir -p /root/.ssh && cat >>/root/.ssh/authorized_keys', stdin=self.type(
            'cat ~/.ssh/id_ed25519.pub'))

    def type(self, text, status=0):
        """What comes of it; the next text is typed in the folder where this one ends."""
        env = {'HOME': self.folder, 'PATH': os.path.join(self.folder, 'bin') + ':' +
               os.environ['PATH'], 'LC_ALL': 'C'}
        outcome = run(['sh', '-ec', '{ %s\n} 2>&1; pwd >"$HOME/cwd"' % text], seconds=500,
                      cwd=self.cwd, env=env)
        assert outcome.status == status, '%s\n%s' % (text, outcome.out)
        if status == 0:
            with open(os.path.join(self.folder, 'cwd')) as file:
                self.cwd = file.read().strip()
        return outcome.out

def write(path, text):
    with io.open(path, 'w', encoding='utf-8') as file:
        file.write(text)

@drill('upstart')
def test_real_the_road_of_the_readme_leads_where_it_says(server, size):
    """On a server with nothing but a base system, to which root's key leads."""
    bare = Server('systemd', server.folder, '-road')
    bare.control('boot', bare.kind)
    try:
        bare.ok('echo "$(hostname -i) example.com www.example.com" >>/etc/hosts')
        return walk(Laptop(bare, os.path.join(server.folder, 'laptop')))
    finally:
        bare.control('remove')

def walk(laptop):
    _, install, write_app, push, link, names, _ = typed_in('From nothing to a running app')
    laptop.type(install)
    laptop.type(write_app)
    answered = laptop.type(push)
    assert answered.endswith('Hello from a container'), answered
    # Where no name can be looked up it ends with another line, as is said there
    link = '[0-9-]+'.join(map(re.escape, link.strip().split('203-0-113-7')))
    assert re.search(link + "|-----> hello answers 200: curl -H 'Host: hello' ", answered)

    laptop.type(names)
    laptop.type("sed -i 's/from/again from/' index.html && git commit -qam Again && "
                'git push host HEAD:main')
    assert laptop.type('curl -s -H "Host: example.com" http://HOST/') == (
        'Hello again from a container')

    # Each of these pushes fails, as shown
    laptop.type("sed -i 's,\"/www\",\"/wwww\",' Dockerfile && git commit -qam Wrong")
    (command, said), = shown_in('When it fails')
    check_shown(laptop.type(command, status=1), said)
    laptop.type("sed -i 's,/wwww,/www,; s/from/here from/' Dockerfile index.html && "
                'git commit -qam Mended && git push host HEAD:main')
    plan, _ = typed_in('Looking first, going back')
    planned = laptop.type('git push host HEAD:plan', status=1)
    check_shown('\n'.join(line for line in planned.splitlines() if re.match(
        r'remote: (-----> What a push|       (nginx|ports|image|gap|space)|dockhand)', line)),
        plan.splitlines())

    for command, said in shown_in('Looking first, going back'):
        check_shown(laptop.type(command), said)
    assert laptop.type('curl -s -H "Host: www.example.com" http://HOST/') == (
        'Hello again from a container')

    keys, = typed_in('Keys, and what each may do')[:1]
    laptop.type("for name in anna ci bob eve me; do ssh-keygen -q -t ed25519 -N '' -f $name; "
                'done')
    laptop.type(keys.replace('cat me.pub ', 'cat me.pub ~/.ssh/id_ed25519.pub '))
    listed = laptop.type('ssh git@HOST keys')
    assert [line.split()[0] for line in listed.splitlines()] == [
        'me', 'anna', 'ci', 'bob', 'eve', 'me'], listed
    laptop.type('printf "A=1\\n" >.env; echo x >secret; echo y >key.pem')
    settings = typed_in('What the server knows: config')[0].replace('shop', 'hello')
    assert 'API_KEY' in laptop.type(settings)
    laptop.type('git clone -q git@HOST:hello again && ssh git@HOST doctor hello && '
                'ssh git@HOST status hello && ssh git@HOST run hello /bin/busybox true')

# ---- What will be tried: each ends in one line and changes nothing ---------------------

def check_one_line(outcome, statuses=(1,)):
    assert outcome.status in statuses, outcome
    assert re.match(r'dockhand: [ -~]+\Z', outcome.err), outcome
    assert not outcome.out, outcome

@pytest.fixture
def target(servers):
    """A server with two apps."""
    server = servers['systemd']
    server.app('shop'), server.app('bpx')
    return server

@pytest.fixture
def untouched(target):
    """A server whose files are the same when the attack is over."""
    paths = ('/etc/nginx', '/etc/systemd', '/etc/sudoers.d', '/home/git',
             '/var/lib/dockhand/apps')
    before = target.manifest(*paths)
    yield target
    assert target.manifest(*paths) == before

NAMES = ['', '.', '..', '.ssh', '../../tmp/x', 'a/b', 'my app', 'Upper', 'a..b', 'a-',
         '-a', 'a', 'a:b', '$(touch /tmp/x)', '*', 'a' * 256, u'\u202eshop',
         '\x1b[31mred', u'sh\u043ep',
         'ssh', 'docker', 'nginx', 'default', 'networking', 'ubuntu', 'python', 'shop\n',
         '/', 'shop.git.git', '.git', "shop';id;'", '--help']
SSH_COMMANDS = [
    'id', 'bash -i', "git-receive-pack 'a';id", "git-receive-pack 'a' 'b'", 'serve main',
    'git-receive-pack --help', "git-upload-pack --timeout=1 'shop'",
    "git-receive-pack 'shop'\n", "git-receive-pack 'shop' " + 'x' * 10240,
    "git-upload-archive 'shop'", 'destroy ..',
    'logs /', 'dockhand destroy shop --force', 'sudo -n id', 'git-receive-pack shop',
    "git-receive-pack 'shop' ", "GIT-RECEIVE-PACK 'shop'", 'scp -t /tmp']

def test_real_ssh_gives_nothing_but_git_and_commands_of_ours(untouched):
    for command in SSH_COMMANDS + ["git-%s-pack '%s'" % (verb, name) for name in NAMES
                                   for verb in ('receive', 'upload')]:
        check_one_line(untouched.ssh('main', command), (1, 2))
    assert untouched.run('ls', '/tmp/x').status != 0
    for words in (('-tt', 'main', 'id'), ('-W', '127.0.0.1:80', 'main')):
        outcome = untouched.ssh('-o', 'ControlPath=none', *words)
        assert outcome.status != 0 and 'uid=' not in outcome.out

def test_real_an_upload_that_is_not_all_public_keys_changes_nothing(untouched):
    good, known = public_key(untouched, 'fresh'), public_key(untouched, 'main')
    with open(os.path.join(untouched.folder, 'fresh')) as file:
        private = file.read()
    for text, pattern in (
            ('', 'no key came in'), ('\n\n', 'no key came in'),
            ('garbage\n', 'no public key'), (private, 'this is a private key'),
            (good + private, 'this is a private key'),
            ('command="/bin/sh" ' + good, 'no public key'),
            (good + 'garbage\n', 'no public key'),
            (good.replace('AAAA', 'AAAB'), 'no public key'), (good[:50], '.'),
            (known, 'known as "main"'), ('x' * (1 << 20), 'larger than'),
            (good.replace(' ', '\x00', 1), 'no public key'),
            (good + '\x1b[31m' + good, '.'),
            ('ssh-ed25519\n' + good.split()[1], 'no public key')):
        outcome = untouched.dockhand('upload-key', 'fresh', stdin=text)
        check_one_line(outcome)
        assert re.search(pattern, outcome.err), outcome
    for name in ('', '-x', 'a b', 'a"b', "a'b", 'a;b', 'a\nb', '../x', 'a' * 65,
                 u'\u043e', '$(id)', 'x\x1b'):
        check_one_line(untouched.dockhand('upload-key', name, stdin=good), (1, 2))
    for name in ('.*', '', 'mai', 'nobody', '-x'):
        check_one_line(untouched.dockhand('remove-key', name), (1, 2))

def test_real_keys_are_uploaded_twice_with_crlf_and_give_no_shell(untouched):
    keys = '/home/git/.ssh/authorized_keys'
    foreign = '# not ours\n\nno-pty ' + public_key(untouched, 'fresh').strip()
    before = untouched.ok('cat ' + keys)
    untouched.ok('cat >%s' % keys, stdin=foreign + '\n' + before + '\n')
    both = public_key(untouched, 'fresh').strip() + '\r\n' + untouched.ok(
        'cat /etc/ssh/ssh_host_ecdsa_key.pub') + '\r\n'
    for _ in range(2):
        assert untouched.run('gitreceive', 'upload-key', 'fresh', stdin=both).status == 0
    text = untouched.ok('cat ' + keys)
    assert text.startswith(foreign) and '\r' not in text
    mine = [line for line in text.splitlines() if line.endswith(' fresh')]
    assert len(mine) == 2 and all(line.startswith('command="') for line in mine)
    assert untouched.ok('stat -c "%a %U" ' + keys) == '600 git'
    assert untouched.ok('dockhand keys').count('fresh ') == 2
    assert untouched.dockhand('remove-key', 'fresh').status == 0
    assert untouched.ok('cat ' + keys) == foreign + '\n' + before
    assert 'fresh' not in untouched.ok('dockhand keys')
    untouched.ok('cat >%s' % keys, stdin=before + '\n')

def test_real_a_key_reaches_its_own_apps_only(target):
    """And `bp` is not `bpx`. What a key may is decided when its connection begins."""
    other = public_key(target, 'other')
    target.disconnect('other')
    assert target.dockhand('upload-key', 'other', 'bp', stdin=other).status == 0
    target.open_connection('other')
    try:
        app = App(target, 'bp', 8093, alias='other')
        app.deploy(web_files('bp', 8093))
        for verb in ('receive', 'upload'):
            outcome = target.ssh('other', "git-%s-pack 'bpx'" % verb)
            check_one_line(outcome)
            assert 'no right to bpx' in outcome.err
        assert re.search(r'(?m)^other .* bp$', target.ok('dockhand keys'))
        assert target.dockhand('remove-key', 'other').status == 0
        target.disconnect('other')
        assert 'Permission denied' in target.ssh('other', "git-upload-pack 'bp'").err
    finally:
        target.ok('dockhand destroy bp --force; dockhand upload-key other', stdin=other)
        target.open_connection('other')

def test_real_the_requests_to_an_app_are_a_page(target):
    if 'asked' not in target.apps:
        target.apps['asked'] = app = Plain(target, 'asked')
        app.deploy(app.files('a'))
    target.ok('for _ in $(seq 50); do curl -s -H "Host: asked.test" http://127.0.0.1/ '
              '>/dev/null; done')
    page = target.ssh('main', 'report asked')
    assert page.status == 0 and page.out.startswith('<!DOCTYPE html>'), page.err
    counted = counted_in(page.out)['general']['total_requests']
    assert counted == int(target.ok('wc -l </var/log/nginx/asked.log')) >= 50

def counted_in(page):
    """What GoAccess has counted, as the page of it has that."""
    return json.loads(re.search(r'json_data ?= ?(\{.*?\})\s*(?:;|</script>|\n)', page).group(1))

# Lines as nginx writes them, of many clients, with what strangers like to ask for
WRITE_LOG = r"""
import random, sys, time
random.seed(1)
number, now = int(sys.argv[1]), time.time()
paths = ['/', '/a%20b', '/index.html', '/api?q=1', '/wp-login.php', '/../../etc/passwd',
         r'/\x22\x5C', '/%00', '/' + 'x' * 300, '/caf\xc3\xa9']
agents = ['Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0', '-',
          'curl/8.5.0', r'\x22<script>alert(1)</script>', 'Googlebot/2.1']
with open('/var/log/nginx/counted.log', 'w') as log:
    for at in range(number):
        client = '2001:db8::%x' % random.randrange(99) if at % 7 == 0 else (
            '198.51.100.%d' % random.randrange(1, 255))
        when = time.strftime('%d/%b/%Y:%H:%M:%S +0000', time.gmtime(now - number + at))
        took = random.random()
        log.write('%s - - [%s] "%s %s HTTP/1.1" %d %d "-" "%s" %.3f %.3f\n' % (
            client, when, random.choice(['GET', 'POST']), random.choice(paths),
            random.choice([200, 200, 200, 304, 404, 502]), random.randrange(10 ** 5),
            random.choice(agents), took, took))
"""
COUNT_LOG = r"""
awk '{ lines++; bytes += $10; statuses[$9]++; clients[$1]++
       if ($7 == "/index.html") pages++ }
     END { for (client in clients) hosts++
           for (status in statuses) print status, statuses[status]
           print "lines", lines; print "bytes", bytes; print "hosts", hosts
           print "pages", pages }' OFMT=%.0f CONVFMT=%.0f /var/log/nginx/counted.log
"""

@drill('systemd', 20000, 10 ** 6)
def test_real_the_counts_of_a_report_are_those_of_awk(server, size):
    app = Plain(server, 'counted')
    app.deploy(app.files('a'))
    server.ok('python3 -c "$1" "$2"', WRITE_LOG, str(size))
    begun = time.time()
    page = server.ssh('main', 'report counted')
    took = time.time() - begun
    assert page.status == 0, page.err
    found = counted_in(page.out)
    right = dict((name, int(count)) for name, count in (
        line.split() for line in server.ok(COUNT_LOG).splitlines()))
    general = found['general']
    assert (general['total_requests'], general['bandwidth'], general['failed_requests']) == (
        right['lines'], right['bytes'], 0) and right['lines'] == size
    assert found['hosts']['metadata']['data']['total']['value'] == right['hosts']
    statuses = dict((status['data'].split()[0], status['hits']['count'])
                    for group in found['status_codes']['data'] for status in group['items'])
    assert statuses == dict((name, count) for name, count in right.items() if name.isdigit())
    pages = [each['hits']['count'] for kind in ('requests', 'not_found')
             for each in found[kind]['data'] if each['data'] == '/index.html']
    assert sum(pages) == right['pages']
    server.ok('dockhand destroy counted --force')
    return '%d lines, a page of %d kB in %.1f s' % (size, len(page.out) // 1000, took)

# What is asked by ssh of an app, with the right that it wants; each of these changes nothing
# that matters, or is over soon
BY_SSH = [
    ('apps', 'read'), ('status', 'read'), ('status {}', 'read'), ('logs {} -n 1', 'read'),
    ('releases {} --json', 'read'), ('config {}', 'read'), ('https', 'read'),
    ('proxy {}', 'read'), ('report {}', 'read'), ('doctor {}', 'read'),
    ('run {} true', 'manage'), ('enter {} true', 'manage'), ('config {} A=1', 'manage'),
    ('config {} --values', 'manage'), ('config {} --next timeout=50', 'manage'),
    ('config {} --unset A', 'manage'), ('restart {}', 'manage'), ('stop {}', 'manage'),
    ('start {}', 'manage'), ('rollback {}', 'manage'), ('rebuild {}', 'manage'),
    ('https {} --off', 'manage'), ('keys', 'admin'), ('doctor', 'admin'),
    ('upload-key nobody', 'admin'), ('remove-key nobody', 'admin'),
    ('recover', 'admin'), ('install', 'root'), ('machines', 'root'),
    ('export', 'root'), ('export {}', 'root'),
    ('import', 'root'), ('uninstall', 'root'), ('destroy {} --force', 'manage')]
LIMITED = [(('--admin',), 'read manage admin'), ((), 'read manage'),
           (('ask-', 'asked', '--read-only'), 'read'), (('--read-only',), 'read'),
           (('asked',), 'read manage')]
DENIED = (r'dockhand: (the key "other" has no right to \S+: it may reach .*|.+ is for (keys '
          r'that were uploaded with --admin|root, on the server itself)|\S+ is not for the '
          r'key "other", which may only read)\Z')

@contextmanager
def limited(server, *words):
    """The other key with such rights, inside a `with`."""
    server.disconnect('other')
    key = public_key(server, 'other')
    assert server.dockhand('upload-key', 'other', *words, stdin=key).status == 0
    server.open_connection('other')
    try:
        yield
    finally:
        server.disconnect('other')
        assert server.dockhand('upload-key', 'other', stdin=key).status == 0
        server.open_connection('other')

@pytest.mark.parametrize('words, rights', one_in(2, LIMITED))
def test_real_each_command_by_ssh_wants_its_right_to_its_own_app(target, words, rights):
    if 'asked' not in target.apps:
        target.apps['asked'] = app = Plain(target, 'asked')
        app.deploy(app.files('a'))
    target.app('shop')
    target.ok('curl -s -H "Host: asked.test" http://127.0.0.1/')        # for `report`
    key, is_limited = public_key(target, 'fresh'), any(word[0] != '-' for word in words)
    with limited(target, *words):
        who = target.ssh('other')
        assert who.status == 0 and who.out.startswith('You are other, and may ')
        for command, right in BY_SSH:
            asked = target.ssh('other', command.format('asked'),
                               stdin=key if 'upload' in command else '')
            if right in rights.split():
                assert asked.status == 0, (command, asked)
            else:
                assert asked.status == 1 and re.match(DENIED, asked.err), (command, asked)
            if is_limited and '{}' in command:
                foreign = target.ssh('other', command.format('shop'))
                missing = target.ssh('other', command.format('none'))
                assert foreign == missing._replace(
                    err=missing.err.replace('none', 'shop')), command
                assert foreign.status == 1 and re.match(DENIED, foreign.err)
    if 'manage' in rights.split():                      # the last one destroyed it
        del target.apps['asked']

def test_each_command_is_among_those_that_are_asked_by_ssh():
    assert set(command.split()[0] for command, _ in BY_SSH) == set(
        verb.name for verb in dh.COMMANDS)

def test_the_table_of_the_readme_has_each_command_with_its_right():
    with io.open(os.path.join(HERE, 'README.md'), encoding='utf-8') as file:
        rows = file.read().partition('\n## Commands\n')[2].partition('\n### ')[0]
    said, names = {}, {'manage': dh.CHANGE, 'read': dh.READ, 'admin': dh.ADMIN,
                       'root': dh.ROOT}
    for line in rows.splitlines():
        match = re.match(r'\| (`.*?`) \| (\w+) \| ', line)
        if match and match.group(2) in names:
            for pattern in re.findall('`(.*?)`', match.group(1)):
                said.setdefault(pattern.split()[0], set()).add(names[match.group(2)])
    assert said == dict((verb.name, set([verb.right, verb.alone])) for verb in dh.COMMANDS)

HOSTILE_BY_SSH = r'''apps; id
apps $(id >/tmp/owned)
apps `id >/tmp/owned`
apps | sh
logs ../../etc
logs asked; id
run asked
enter asked -- sh -c id\;id
config asked A=1 >/tmp/owned
config asked "A=
scp -t /etc
sftp
rsync --server . /
git-upload-archive asked
internal-sftp
receive check
command other
serve main
/bin/sh
status --json asked asked asked
logs asked -n -1
logs asked --since $(id)
logs asked --since 2026-99-99
logs asked -n 99999999999999999999
config ../../../../home/git/asked.git
config asked/../asked
upload-key x --admin
releases asked ''
help $(id)
'''

def test_real_what_is_hostile_by_ssh_is_answered_by_one_line(target):
    """With a key that may only read, so that whatever is taken can do no harm."""
    if 'asked' not in target.apps:
        target.apps['asked'] = app = Plain(target, 'asked')
        app.deploy(app.files('a'))
    with limited(target, 'asked', '--read-only'):
        before = target.manifest('/etc', '/home/git', '/usr/local')
        for command in HOSTILE_BY_SSH.splitlines():
            asked = target.ssh('other', command)
            assert asked.status in (1, 2) and not asked.out, (command, asked)
            assert len(asked.err.splitlines()) == 1, (command, asked)
            assert re.match(r'dockhand: [ -~]{1,400}\Z', asked.err), (command, asked)
        changed = [line for line in target.manifest('/etc', '/home/git', '/usr/local')
                   if line not in before and '.ssh/dockhand' not in line]
        assert changed == []
        assert target.run('test', '-e', '/tmp/owned').status == 1

def test_real_no_value_of_a_setting_is_in_the_log(target):
    if 'asked' not in target.apps:
        target.apps['asked'] = app = Plain(target, 'asked')
        app.deploy(app.files('a'))
    secret = 'hush-%d' % SEED
    assert target.ssh('main', 'config asked FIRST=%s' % secret).status == 0
    assert target.ssh('main', 'config', 'asked', "'9=%s'" % secret).status == 1
    said = target.ok('journalctl -o cat; cat /var/log/auth.log /var/log/syslog 2>/dev/null '
                     '|| :')
    assert re.search('(?m)^asked: .*config FIRST', said) and secret not in said

REAL_JOB = web_files('shop', 8094)['upstart.conf']
REAL_PROXY = 'server { listen 80; server_name shop.test; return 200 bad; }\n'
REAL_THREE = ('Dockerfile', 'upstart.conf', 'nginx-proxy.conf')
FILES_REFUSED = [
    (name, ('/etc/shadow',), name + ' is a link')
    for name in REAL_THREE + ('.dockerignore',)] + [
    (name + '/x', 'x', name + ' is a folder') for name in REAL_THREE] + [
    (name, '', name + ' is empty') for name in REAL_THREE] + [
    (name, 'FROM tiny:1\n\0', name + ' holds a NUL') for name in REAL_THREE] + [
    (name, b'# x\n' * (1 << 17), name + ' is larger than') for name in REAL_THREE] + [
    ('upstart.conf', b'# x\n' * (25 << 20), 'upstart.conf is larger than'),
    ('upstart.conf', u'\ufeff' + REAL_JOB, 'upstart.conf:1: .*byte order mark'),
    ('nginx-proxy.conf', u'\ufeff' + REAL_PROXY, 'nginx-proxy.conf:1: .*byte order mark'),
    ('Dockerfile', None, 'no Dockerfile in this commit'),
    ('Dockerfile', 'FROM tiny:1\nRUN \x1b[31mfalse\n', 'the build failed'),
    ('upstart.conf', 'respawn\n', 'upstart.conf:1: no `exec` or `script`'),
    ('upstart.conf', 'script\n  docker run shop\n',
     'upstart.conf:1: .*without `end script`'),
    ('upstart.conf', 'respwan\n' + REAL_JOB,
     'upstart.conf:1: `respwan`: an unknown stanza'),
    ('upstart.conf', REAL_JOB.replace('--rm', '-d'), 'upstart.conf:4: `-d`'),
    ('upstart.conf', REAL_JOB.replace('--rm', '-i -t'), 'upstart.conf:4: `-[it]`'),
    ('upstart.conf', REAL_JOB.replace('--rm', '--name x1'),
     'upstart.conf:4: `--name`: without'),
    ('upstart.conf', REAL_JOB.replace('--rm', '--rm --name x'),
     'upstart.conf:4: .*two characters'),
    ('upstart.conf', 'kill signal 2\n' + REAL_JOB, 'upstart.conf:1: `kill signal 2`')]

@pytest.mark.parametrize('name, text, pattern', FILES_REFUSED, ids=[
    '%s-%d' % (row[0], number) for number, row in enumerate(FILES_REFUSED)])
def test_real_a_file_that_will_not_do_is_refused(target, name, text, pattern):
    app = target.app('shop')
    refs = 'runuser -u git -- git --git-dir=/home/git/shop.git for-each-ref'
    before = target.manifest('/etc/nginx'), target.ok(refs)
    pushed = refused(app, {name: text}, pattern, 1)
    assert '\x1b' not in pushed.err and 'root:' not in pushed.err
    assert (target.manifest('/etc/nginx'), target.ok(refs)) == before

def test_real_what_the_git_user_may_run_as_root_takes_no_other_words(untouched):
    zero, one = '0' * 40, 'a' * 40
    for words in ([], ['install'], ['update', 'shop', 'main', 'refs/heads/main', zero],
                  ['update', '../x', 'main', 'refs/heads/main', zero, one],
                  ['update', 'shop', '-x', 'refs/heads/main', zero, one],
                  ['update', 'shop', 'main', 'refs/heads/main', zero, '--output=/tmp/x'],
                  ['update', 'shop', 'main', 'refs/x/$(id)', zero, one],
                  ['update', '', '', 'refs/heads/main', zero, one],
                  ['post-receive', 'shop', 'main', 'x'], ['destroy', 'shop', '--force']):
        check_one_line(untouched.run('sudo', '-u', 'git', 'sudo', '-n',
                                     '/usr/local/lib/dockhand/receive', *words))
    assert untouched.run('sudo', '-u', 'git', 'sudo', '-n', 'id').status != 0

# ---- Commands --------------------------------------------------------------------------

@everywhere
def test_real_stop_start_and_restart(server):
    app = server.app('shop')
    answer, began = app.answer(), server.inside(app, '{{.State.StartedAt}}')
    server.ok('dockhand restart shop')
    assert app.answer() == answer
    assert server.inside(app, '{{.State.StartedAt}}') != began
    for _ in range(2):
        server.ok('dockhand stop shop')
        assert app.answer() == '502' and app.container() == ''
    for _ in range(2):
        server.ok('dockhand start shop')
        assert app.answer() == answer
    for command in ('stop', 'start', 'restart', 'logs', 'rebuild'):
        for name in ('nobody', '../shop', ''):
            check_one_line(server.dockhand(command, name))

@everywhere
def test_real_apps_lists_them(server):
    app = server.app('shop')
    line = re.search(r'(?m)^shop .*', server.ok('dockhand apps')).group()
    assert re.match(r'shop +running +%s +\d{4}-\d\d-\d\d \d\d:\d\d +main +'
                    r'http://shop\.test/$' % app.branch()[:10], line)

@everywhere
def test_real_logs_shows_what_an_app_prints(server):
    app = App(server, 'chatty', 8096)
    app.deploy(web_files('chatty', 8096, command='echo one; echo two; echo three; '
                         'exec httpd -f -h /www'))
    assert server.ok('dockhand logs chatty').split()[-3:] == ['one', 'two', 'three']
    assert server.ok('dockhand logs chatty -n 2').split() == ['two', 'three']
    assert server.ok('dockhand logs -n1 chatty').split() == ['three']
    followed = server.run('timeout', '2', 'dockhand', 'logs', '-f', 'chatty', '-n', '1')
    assert (followed.status, followed.out) == (124, 'three')
    check_one_line(server.dockhand('logs', 'chatty', '-n', 'x'))

@everywhere
def test_real_rebuild_makes_a_new_release_of_the_same_commit(server):
    app = server.app('shop')
    answer, branch, image = app.answer(), app.branch(), server.inside(app, '{{.Image}}')
    server.ok('cd /root/tiny && echo moved >moved && tar -c . | docker import - tiny:1')
    server.ok('dockhand rebuild shop')
    assert (app.answer(), app.branch()) == (answer, branch)
    assert server.inside(app, '{{.Image}}') != image
    assert server.ok('docker exec %s cat /moved' % app.container()) == 'moved'
    assert app.push().err.endswith('Everything up-to-date')
    failed = server.dockhand('rebuild', 'shop', '--pull')   # there is no registry here
    assert failed.status == 1 and 'dockhand: the build failed' in failed.err
    assert app.answer() == answer

# What is broken, what doctor says, and what mends it where that is not what doctor says.
AILMENTS = [
    ('mv /usr/bin/git /usr/bin/git.off', 'git', 'mv /usr/bin/git.off /usr/bin/git'),
    ('systemctl stop docker.socket docker', 'docker does not answer', None),
    ('echo x >>/usr/local/lib/dockhand/receive', 'lib/dockhand/receive is not as inst',
     None),
    ('rm /home/git/shop.git/hooks/update', 'hooks/update is not as installed', None),
    ('rm /etc/sudoers.d/dockhand', 'sudoers.d/dockhand is not as installed', None),
    ('sed -i "/includedir/s/^/# /" /etc/sudoers', 'git cannot run .*receive by sudo',
     'sed -i "/includedir/s/^# //" /etc/sudoers'),
    ('echo AllowUsers root >/etc/ssh/sshd_config.d/x.conf',
     'AllowUsers of sshd is root, without git', 'rm /etc/ssh/sshd_config.d/x.conf'),
    ('echo AllowGroups root >/etc/ssh/sshd_config.d/x.conf',
     'AllowGroups of sshd is root, without git', 'rm /etc/ssh/sshd_config.d/x.conf'),
    ('echo AuthorizedKeysFile /etc/keys/%u >/etc/ssh/sshd_config.d/x.conf',
     'AuthorizedKeysFile of sshd is /etc/keys', 'rm /etc/ssh/sshd_config.d/x.conf'),
    ('mv /home/git/.ssh /home/git/.ssh.off', 'no key may push',
     'mv /home/git/.ssh.off /home/git/.ssh'),
    ('echo "bogus on;" >/etc/nginx/conf.d/x.conf', 'x.conf:1: unknown directive "bogus"',
     'rm /etc/nginx/conf.d/x.conf'),
    ('systemctl stop nginx', 'nginx does not run', 'systemctl start nginx'),
    ('echo >>/etc/nginx/conf.d/000-dockhand.conf', '000-dockhand.conf is not as inst',
     None),
    ('docker stop $(docker ps -q --filter ancestor=shop:latest)', 'shop does not run',
     None),
    ('docker rmi -f $(docker images --format "{{.Repository}}:{{.Tag}}" shop)',
     'the image of shop is gone', None),
    ('cd /var/lib/dockhand/apps/shop && ln -s $(readlink live) pending',
     'a deploy of shop was inte', None)]

@pytest.mark.parametrize('harm, pattern, cure', AILMENTS,
                         ids=[row[1][:25] for row in AILMENTS])
def test_real_doctor_says_what_is_wrong_and_what_to_type(target, harm, pattern, cure):
    app = target.app('shop')
    target.ok(harm)
    try:
        sick = target.dockhand('doctor')
        assert sick.status == 1, sick
        advice = re.search('WRONG .*(?:%s).*\n +type: (.*)' % pattern, sick.out)
        assert advice, sick
        cure = cure or advice.group(1)
    finally:
        target.ok(cure or 'systemctl start docker; /usr/bin/python3 '
                  '/root/dockhand/dockhand.py install; dockhand start shop')
    assert not until(lambda: re.search(pattern, target.dockhand('doctor').out), None, 10)
    assert app.answer() == app.git('show', 'HEAD:www/index.html')

def test_real_install_takes_another_user(servers):
    server = servers['none']
    install = '/usr/bin/python3 /root/dockhand/dockhand.py install --user '
    said = server.ok(install + 'hoster')
    assert 'made the user hoster' in said or KEEP
    try:
        assert server.ok(install + 'hoster') == 'nothing changed'
        server.ok('dockhand upload-key main', stdin=public_key(server, 'main'))
        server.open_connection('hoster')
        app = App(server, 'elsewhere', 8097, alias='hoster')
        app.deploy(web_files('elsewhere', 8097))
        assert app.answer() == 'elsewhere'
        assert server.ok('stat -c %U /home/hoster/elsewhere.git') == 'hoster'
        server.ok('dockhand destroy elsewhere --force')
    finally:
        server.ok(install + 'git')
    server.app('shop').change('back with git')

@everywhere
def test_real_destroy_leaves_nothing_of_an_app(server):
    def look():
        return set(server.manifest('/etc', '/home/git', '/var/lib/dockhand') + server.ok(
            'docker ps -a --format "{{.Image}} {{.Names}}" | grep passing || :;'
            'docker images --format "{{.Repository}}:{{.Tag}}"').splitlines())
    before = look()
    app = App(server, 'passing', 8098)
    app.deploy(web_files('passing', 8098))
    app.change('two')
    check_one_line(server.dockhand('destroy', 'passing'))
    assert app.answer() == 'two'
    server.ok('dockhand destroy passing --force')
    assert look() ^ before == set()
    assert server.get('passing.test') != 'two'

NO_QUESTIONS = ('ssh -F /dev/null -o StrictHostKeyChecking=no -o LogLevel=ERROR '
                '-o UserKnownHostsFile=/dev/null -i ')

@pytest.mark.parametrize('command', [
    'vagrant validate -p', 'shellcheck configure-system.sh .ci/run .ci/server'])
def test_real_what_other_tools_read_is_valid_to_them(command, tmpdir):
    words = command.split()
    demand_tool(words[0])
    env = dict(os.environ, VAGRANT_DOTFILE_PATH=str(tmpdir), VAGRANT_HOME=str(tmpdir))
    assert run(words, cwd=HERE, env=env).status == 0

@pytest.mark.parametrize('address', [
    pytest.param('192.168.56.80', id='whole', marks=WHOLE)])
def test_real_vagrant_up_makes_a_server_to_push_to(address, tmpdir):
    """With vagrant's docker provider, and a box that `.ci/server` makes."""
    demand_engine()
    demand_tool('vagrant')
    key, box = str(tmpdir.join('key')), str(tmpdir.join('server.box'))
    must(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', key])
    must(['sh', HERE + '/.ci/server', 'box', box, key])
    env = dict(os.environ, VAGRANT_HOME=str(tmpdir.mkdir('home')), LC_ALL='C.UTF-8',
               VAGRANT_DOTFILE_PATH=str(tmpdir.join('dotfiles')),
               VAGRANT_DEFAULT_PROVIDER='docker', DOCKHAND_BOX='dockhand-test',
               GIT_SSH_COMMAND=NO_QUESTIONS + key)

    def vagrant(*words, **options):
        return must(['vagrant'] + list(words), cwd=HERE, env=env, **options)

    def git(*words):
        return must(['git', '-c', 'user.name=test', '-c', 'user.email=test@localhost'] +
                    list(words), cwd=str(folder), env=env)
    try:
        vagrant('box', 'add', '--name', 'dockhand-test', box)
        vagrant('up')
        assert 'this system was ready' in vagrant('provision', 'docker-dev')
        assert vagrant('ssh', '-c', 'systemctl is-active avahi-daemon') == 'active'
        vagrant('ssh', '-c', 'sudo sh', stdin=TINY)
        with open(key + '.pub') as public:
            vagrant('ssh', '-c', 'sudo gitreceive upload-key me', stdin=public.read())

        folder = tmpdir.mkdir('hello')
        folder.join('Dockerfile').write(REAL_WEB + 'EXPOSE 80\n' + Plain.COMMAND)
        folder.mkdir('www').join('index.html').write('Hello from vagrant\n')
        git('init', '-q')
        git('add', '.')
        git('commit', '-q', '-m', 'an app')
        git('remote', 'add', 'vagrant', 'git@%s:hello' % address)
        git('push', 'vagrant', 'HEAD:main')
        assert must(['curl', '-s', '-H', 'Host: hello', 'http://%s/' % address]) == (
            'Hello from vagrant')
    finally:
        run(['vagrant', 'destroy', '-f'], cwd=HERE, env=env)
        run(['docker', 'rmi', 'dockhand-test-box'])

# ---- Drills: put back, rolled back, never half -----------------------------------------

# Each prints its figures (`-rP` shows them). They run short; `-m whole` runs those whole
# that have a second size. Those of a server run one after another, beside the others'.

# Kills all that a push has started on a server, N seconds after it came: what is below
# sshd, and no sshd. What is stopped first cannot start more meanwhile.
KILLER = '''
pushed() {
    ps -eo pid=,ppid=,comm= | awk '$3 ~ /^sshd/ { sshd[$1] } $3 !~ /^sshd/ { parent[$1] = $2 }
        END { for (pid in parent) { at = pid; while (at in parent) at = parent[at]
              if (at in sshd) print pid } }' | sort -n
}
for _ in $(seq 500); do [ -z "$(pushed)" ] || break; sleep 0.01; done
sleep "$1"
while [ "$struck" != "$(pushed)" ]; do struck=$(pushed); kill -STOP $struck; done
kill -KILL $struck
echo $struck | wc -w'''

def two_apps(server):
    """An app to be deployed while things happen, a neighbour, the seconds of a push."""
    if 'drilled' not in server.apps:
        app = Marked(server, 'drilled', 8501)
        neighbour = Marked(server, 'neighbour', 8502)
        neighbour.release('n'), app.release('a')
        begun = time.time()
        app.release('b')
        server.apps['drilled'] = app, neighbour, time.time() - begun
    return server.apps['drilled']

def interrupt(app, times, seconds, strike, recover):
    """Push as often, strike at a random moment of each push, recover; figures."""
    generator, live, lived, took = random.Random(SEED), app.mark(), 0, []
    moments = [(at + generator.random()) * seconds / times for at in range(times)]
    generator.shuffle(moments)
    for turn, moment in enumerate(moments):
        mark = '%s%d' % (strike.__name__, turn)
        app.commit(app.files(mark))
        pushed, _ = together(app.push, functools.partial(strike, moment))
        begun = time.time()
        recover()
        answer = app.check_whole(live, mark)
        took.append(time.time() - begun)
        if answer == mark:
            lived, live = lived + 1, mark
            if turn % 2:                        # or the next one is one's own as well
                live = mark + 'next'
                app.commit(app.files(live))
            pushed = app.push()                 # accepted at once, where git missed it
            assert pushed.status == 0, pushed
        assert pushed.status or answer == mark
    app.release('after')
    return '%d of %d pushes live all the same, whole again after %.1f s at most' % (
        lived, times, max(took))

@drill('systemd', 5, 50)
def test_real_killed_pushes_leave_one_whole_release(server, size):
    app, neighbour, seconds = two_apps(server)
    struck, kept = [], []

    def killed(moment):
        struck.append(server.ok(KILLER, str(moment)))

    def recover():
        recovered = server.run('dockhand', 'recover')
        assert recovered.status == 0, recovered.err
        kept.extend(re.findall('docker keeps', recovered.err))      # and is restarted
    with Watch(server, app, neighbour) as watch:
        said = interrupt(app, size, seconds, killed, recover)
    assert kept or watch.heard['neighbour'].count('') == 0
    return '%s; %s processes killed; %d times docker had kept a port; %s' % (
        said, ' '.join(struck), len(kept), watch.figures())

# Until docker has just begun to start the container of a new release
STARTING = '''
there() { pgrep -f '^[^ ]*docker-proxy .*-host-port 8501 ' >/dev/null; }
for _ in $(seq 2000); do there || break; sleep 0.01; done
for _ in $(seq 2000); do ! there || break; sleep 0.001; done'''

@drill('systemd', 2, 10)
def test_real_power_cuts_leave_one_whole_release(server, size):
    """The first at the worst moment: docker would keep the port of what it starts."""
    (app, neighbour, seconds), cuts = two_apps(server), []

    def cut(moment):
        server.ok(STARTING) if not cuts else time.sleep(moment)
        cuts.append(must(['docker', 'kill', server.name]))

    def boot():
        server.reboot(('start',))
        watch.test_nginx()
        neighbour.check_whole('n')
    with Watch(server, app, neighbour) as watch:
        said = interrupt(app, size, seconds, cut, boot)
    kept = server.ok('journalctl -u dockhand-recover').count('docker keeps')
    assert kept >= 1
    return '%s; %d times docker had kept a port; %s' % (said, kept, watch.figures())

def harmed(app, pattern, harm):
    """Push, and do harm once the push says this: (status, dockhand's lines, all)."""
    process, heard = app.hear(pattern)
    app.server.ok(harm)
    err = (heard + process.communicate(timeout=120)[0]).decode('utf-8', 'replace')
    return process.returncode, re.findall(r'(?m)^remote: (dockhand: .*?) *$', err), err

def refused_after(app, pattern, harm, reason):
    """Push, do harm as soon as the push says this, and see it refused for the reason."""
    branch = app.branch()
    status, said, err = harmed(app, pattern, harm)
    assert status and re.search(reason, said[-1]), err
    assert app.branch() == branch
    return '%s: %s' % (pattern, said[-1])

STOP_DOCKER = 'systemctl stop docker.socket docker'
START_DOCKER = 'systemctl reset-failed docker && systemctl start docker.socket docker'
SMALL_DISK = STOP_DOCKER + '''
cd /var/lib && mount -t tmpfs -o size=700m small docker
mkdir -p docker/state/apps && cp -a dockhand/build docker/state
mount --bind docker/state dockhand && ''' + START_DOCKER
LARGE_DISK = STOP_DOCKER + '''
cd /var/lib && umount dockhand && umount -l docker && ''' + START_DOCKER
# What docker frees meanwhile is filled too, until the file is removed.
FILL = '''exec 3>/var/lib/docker/full >/dev/null 2>&1
cat /dev/zero >&3
while [ -e /var/lib/docker/full ]; do cat /dev/zero >&3; sleep 0.02; done &'''
FREE = '''rm /var/lib/docker/full
for _ in $(seq 500); do
    [ $(stat -f -c %f /var/lib/docker) -lt 9999 ] || break; sleep 0.02
done'''

@drill('systemd')
def test_real_a_disk_that_fills_up_refuses_a_push_until_there_is_room(server, size):
    server.ok(SMALL_DISK + TINY)
    try:
        app, said = Marked(server, 'cramped', 8503), []
        app.release('a')
        app.commit(app.files('b', slow='RUN sleep 4 && echo\n'))
        said.append(refused_after(app, 'RUN sleep', FILL, '(?i)no space left'))
        assert app.mark() == 'a'
        server.ok(FREE + '\ndockhand recover')
        assert app.mark() == 'a'
        status, lines, err = harmed(app, 'Switching', FILL)
        assert not status or re.search('(?i)no space left', lines[-1]), err
        said += lines[-1:]
        server.ok(FREE + '\ndockhand recover')
        if not status:                  # docker could just start it before that
            assert app.mark() == 'b'
            server.ok('dockhand rollback cramped')
        assert app.mark() == 'a'
        server.ok('fallocate -l 250M /var/lib/docker/full')
        pushed = app.push()
        check_refusal(pushed, r'\d\d\d MB are free')
        assert 'Building' not in pushed.err and app.mark() == 'a'
        server.ok('rm /var/lib/docker/full')
        assert app.push().status == 0 and app.mark() == 'b'
        return ' / '.join(said + pushed.out[-1:])
    finally:
        server.run('sh', '-c',
                   'rm -f /var/lib/docker/full; dockhand destroy cramped --force')
        server.ok(LARGE_DISK)

@drill('systemd')
def test_real_a_push_ends_with_a_link_where_its_name_can_be_looked_up(server, size):
    app = Plain(server, 'linked')
    address = server.ok('ip -4 -o addr show eth0').split()[3].partition('/')[0]
    link = 'linked.%s.sslip.io' % address.replace('.', '-')
    try:
        pushed = app.deploy(app.files('one'))
        assert "-----> linked answers 200: curl -H 'Host: linked' http://%s/" % address in (
            pushed.out)
        server.ok('echo "%s %s" >>/etc/hosts' % (address, link))
        pushed = app.deploy(app.files('two'))
        assert pushed.out[-1] == '-----> linked: http://%s/ answers 200' % link
    finally:
        server.ok('sed "/sslip/d" /etc/hosts >/tmp/hosts; cat /tmp/hosts >/etc/hosts')
        server.dockhand('destroy', 'linked', '--force')
    return pushed.out[-1]

@drill('systemd')
def test_real_the_log_has_one_line_for_each_change(server, size):
    app = server.app('shop')

    def logged():
        return server.ok('journalctl -q -o cat -t dockhand').splitlines()
    app.change('logged')
    before = len(logged())
    app.change('logged at last')
    refused(app, {'Dockerfile': 'FROM tiny:1\nRUN false\n'}, 'build failed', 1)
    server.ok('dockhand rollback shop')
    server.ok('dockhand upload-key fresh', stdin=public_key(server, 'fresh'))
    server.ok('dockhand remove-key fresh')
    patterns = ['shop: release .* is live: push by main', 'shop.* refused: the build failed',
                'shop: release .* is live again: rollback from .* by root',
                'key fresh: may push and manage every app: upload-key by root',
                'key fresh: remove-key by root']
    until(lambda: len(logged()) - before >= len(patterns), True, 10)
    lines = logged()[before:]
    assert len(lines) == len(patterns) and all(map(re.search, patterns, lines)), lines
    return ' / '.join(lines)

USED = 'du -xsk /var/lib/docker /var/lib/dockhand /home/git | cut -f 1'
FOREIGN = r'''
printf 'FROM tiny:1\nRUN echo mine >/mine\n' | docker build -q -
printf 'FROM disk:1\nRUN echo mine >/mine\n' | docker build -q -t child -
docker create tiny:1 true'''

@drill('none', 12, 40)
def test_real_pushes_in_a_row_do_not_fill_the_disk(server, size):
    """The last takes no more than the tenth did, or the seventh, where there are few."""
    app, used, base = App(server, 'disk', 8506), {}, server.ok(USED).split()
    for number in range(1, size + 1):
        app.deploy(dict(web_files('disk', 8506), **{
            'www/load': '%d %s\n' % (number, random.Random(number).random()) * 50000}))
        used[number] = server.ok(USED).split()
        if number == 1:
            foreign = server.ok(FOREIGN).split()
    first = 10 if size > 12 else 7
    then, now = sum(map(int, used[first])), sum(map(int, used[size]))
    figures = ('docker + dockhand + git: %s KB before, %s then, %s at the end, '
               '%.3f of that') % (
        ' + '.join(base), ' + '.join(used[first]), ' + '.join(used[size]),
        now / float(then))
    assert now <= 1.05 * then, figures
    listed = server.ok('dockhand releases disk').splitlines()
    numbers = [line.split()[0] for line in listed]
    assert numbers == [str(size - at) for at in range(5)], listed
    assert len(server.ok('docker images -q disk').splitlines()) == 6    # with disk:latest
    server.ok('docker inspect ' + ' '.join(foreign))
    return figures

STAGED = '''FROM tiny:1 AS same
RUN head -c 20000000 /dev/urandom >/same && md5sum /same >/sum
FROM tiny:1 AS other
COPY www /www
RUN head -c 20000000 /dev/urandom >/other
FROM tiny:1
COPY --from=other /www /www
COPY --from=same /sum /www/sum
EXPOSE 80
CMD ["httpd", "-f", "-h", "/www"]
'''
# Of the release after: a Go program, which runs on an older Debian too
BRING_BUILDX = '''
set -e; . /etc/os-release; cd /root; mkdir -p lists/partial
for path in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
    [ ! -f "$path" ] || sed "s/$VERSION_CODENAME/trixie/g" "$path"
done | grep '^deb ' >newer.list
newer() { apt-get -q -o Dir::Etc::SourceList=/root/newer.list -o Dir::Etc::SourceParts=- \\
    -o Dir::State::Lists=/root/lists "$@"; }
newer update; newer download docker-buildx
dpkg -x docker-buildx_*.deb buildx; mkdir -p /usr/local/lib/docker
cp -r buildx/usr/libexec/docker/cli-plugins /usr/local/lib/docker/
echo '{"features": {"buildkit": true}}' >/etc/docker/daemon.json    # for docker before 23
'''
TAKE_BUILDX = 'rm -r /usr/local/lib/docker/cli-plugins /etc/docker/daemon.json'

@drill('none', (('older',), 7), (('older', 'buildx'), 20))
def test_real_pushes_of_many_stages_do_not_fill_the_disk(server, size):
    """The last takes no more than the fifth did; a stage that is the same runs once."""
    builders, pushes = size
    said = []
    for builder in builders:
        if builder == 'buildx':
            server.ok(BRING_BUILDX)
            server.restart_docker()
            said.append(server.ok('docker buildx version'))
        app, used = Plain(server, 'staged-' + builder), []
        try:
            for number in range(pushes):
                files = app.files('push%d' % number)
                pushed = app.deploy(dict(files, Dockerfile=STAGED))
                asked = server.hear(80, 'GET /sum HTTP/1.0\r\nHost: %s.test\r\n\r\n'
                                    % app.name)
                used.append((server.ok('du -xsk /var/lib/docker'), asked.split()[-2]))
            sizes = [int(text.split()[0]) for text, _ in used]
            said.append('%s: %d KB after the fifth push, %d after the last of %d: %.3f' % (
                builder, sizes[4], sizes[-1], pushes, sizes[-1] / float(sizes[4])))
            assert sizes[-1] <= 1.05 * sizes[4], said
            assert len(set(checksum for _, checksum in used)) == 1, used
            assert (builder == 'buildx') == ('#1 [internal]' in str(pushed.out)), pushed
        finally:
            server.dockhand('destroy', app.name, '--force')
            if builder == 'buildx':
                server.ok(TAKE_BUILDX)
                server.restart_docker()
    return '; '.join(said)

@drill('upstart')
def test_real_what_was_pruned_is_made_again(server, size):
    app = server.app('survivor')
    app.change('kept'), app.change('survivor')
    server.ok('docker rm -f $1 && dockhand recover', app.container())
    assert until(app.answer, 'survivor') == 'survivor'      # recover starts, and goes on
    server.ok('dockhand stop survivor && docker system prune -f && dockhand recover')
    assert app.answer() == '502'
    server.ok('dockhand start survivor')
    assert app.answer() == 'survivor'
    server.ok('docker system prune -f && dockhand rollback survivor')
    assert app.answer() == 'kept'
    app.follow()
    app.change('survivor')

@drill('none')
def test_real_a_rollback_to_a_removed_image_says_so_and_changes_nothing(server, size):
    app = server.app('shop')
    app.change('with an image'), app.change('with another')
    number = int(re.search(r'(\d+) .* live',
                           server.ok('dockhand releases shop')).group(1)) - 1
    server.ok('docker rm shop--$1 && docker rmi shop:$1', str(number))
    before = look_at(server, app)
    for words in (), (str(number),):
        outcome = server.dockhand('rollback', 'shop', *words)
        check_one_line(outcome)
        assert 'image shop:%d was removed' % number in outcome.err
    assert look_at(server, app) == before

OTHER_FILE = '/etc/nginx/conf.d/elses.conf'
BREAK_NGINX = 'echo "bogus on;" >' + OTHER_FILE
NO_DOCKER = 'docker does not answer|annot connect to the Docker'
FAULTS = [      # when, what, what mends it, the reason given, whether the old one answers
    ('RUN sleep', 'stop docker', 'start docker', NO_DOCKER, False),
    ('Switching', 'stop docker', 'start docker', NO_DOCKER, False),
    ('RUN sleep', BREAK_NGINX, 'rm ' + OTHER_FILE, '/elses.conf:1: unknown directive',
     True),
    ('RUN sleep', 'stop nginx; ' + BREAK_NGINX, 'rm ' + OTHER_FILE,
     '/elses.conf:1: unknown directive', False)]

@drill('upstart')
def test_real_what_breaks_in_mid_deploy_is_named_and_mended_by_the_same_push(
        server, size):
    app, said = Marked(server, 'faulty', 8504), []
    app.release('a')
    for turn, (when, harm, mend, reason, answers) in enumerate(FAULTS):
        live, mark = app.mark(), 'f%d' % turn
        app.commit(app.files(mark, slow='RUN sleep 2 && echo\n'))
        try:
            said.append(refused_after(app, when, harm, reason))
            answer = live if answers else ''
            assert until(app.mark, answer, 10) == answer
        finally:
            server.ok(mend)
        pushed = app.push()
        assert pushed.status == 0 and app.mark() == mark, pushed.err
    return ' / '.join(said)

LOCKED = '''
find /run/lock/dockhand -type f |
while read lock; do flock -n $lock true || echo $lock; done'''
CUT_OFF = ("'-oProxyCommand=docker exec -i %s sh -c \"echo \\$\\$ >>/root/cut; "
           "exec busybox nc 127.0.0.1 22\"'")

def left_over(server):
    """What is there while a push is under way: locks, processes."""
    return server.ok(LOCKED).split() + re.findall(
        '.*(?:receive|docker build|sudo ).*', server.ok('ps -eo args='))

@drill('upstart', 3, 8)
def test_real_pushers_who_are_gone_in_mid_build_leave_nothing_behind(server, size):
    """Killed, stopped, or cut off: what they are sent is taken by nobody."""
    apps = [App(server, 'gone%d' % number, 8510 + number) for number in range(size)]
    for app in apps:
        files = web_files(app.name, app.port)
        output = 'RUN busybox yes %s | busybox head -n %d\nCOPY' % (
            'long-line' * 10, 30000 if size < 8 else 100000)
        app.commit(dict(files, Dockerfile=files['Dockerfile'].replace('COPY', output)))
    pushers = [process for process, _ in together(*[functools.partial(
        app.hear, 'long-line', '-oControlPath=none' + (
            ' ' + CUT_OFF % server.name if number % 3 == 2 else ''))
        for number, app in enumerate(apps)])]
    begun = time.time()
    try:
        server.ok('kill -STOP $(cat /root/cut)')
        for number, process in enumerate(pushers):
            os.killpg(process.pid, signal.SIGSTOP if number % 3 == 1 else signal.SIGKILL)
        left = until(lambda: left_over(server), [], 90 if size < 8 else 180)
        seconds = time.time() - begun
        assert left == []
    finally:
        for process in pushers:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        server.ok('kill -KILL $(cat /root/cut); rm /root/cut')
    for app in apps:
        pushed = app.push()
        assert pushed.status == 0 and app.answer() == app.name, pushed.err
    return '%d builds, the last process and lock gone after %.1f s' % (size, seconds)

@drill('upstart', 8, 20)
def test_real_many_apps_pushed_at_once_are_live_or_refused(server, size):
    """Two ssh connections carry them: sshd lets few begin at once."""
    apps = [Marked(server, 'many%d' % number, 8530 + number,
                   ('main', 'other')[number % 2])
            for number in range(size)]
    for app in apps:
        app.commit(app.files('m'))
    for app in apps[3::4]:
        app.commit({'nginx-proxy.conf':
                    'server { listen 80; server_name a.test; bogus on; }\n'})
    begun = time.time()
    with Watch(server) as watch:
        pushed = together(*[app.push for app in apps])
    seconds = time.time() - begun
    for app, outcome in list(zip(apps, pushed))[3::4]:
        check_refusal(outcome, 'nginx-proxy.conf:1: .*bogus')
        apps.remove(app)
        pushed.remove(outcome)
        assert app.branch() == '' and app.mark() != 'm'
    for app, outcome in zip(apps, pushed):
        assert outcome.status == 0, outcome.err
        app.check_whole('m')
    return '%d of %d live after %.1f s; %s' % (len(apps), size, seconds, watch.figures())

@drill('upstart')
def test_real_a_push_reports_and_releases_lists_what_became_of_each(server, size):
    app = server.app('shop')
    said = app.deploy({'www/index.html': 'reported'}).err
    number = re.search(r'-----> Release (\d+) is live: built in \d+\.\d s, switched in '
                       r'\d+\.\d s, checked in \d+\.\d s, down for \d+\.\d s',
                       said).group(1)
    shown = server.ok('docker image inspect -f "{{.Size}}" shop:latest')
    assert '       image: %.1f MB' % (int(shown) / 1e6) in said, said
    assert re.search(r"-> shop answers 200: curl -H 'Host: shop\.test' http://[\d.]+/",
                     said), said
    refused(app, {'Dockerfile': 'FROM tiny:1\nRUN false\n'}, 'build failed', 1)
    listed = server.ok('dockhand releases shop').splitlines()
    when = r'[\d-]{10} \d\d:\d\d'
    assert re.match(r' *%d  [0-9a-f]{10}  %s  main +-  failed: the build failed'
                    % (int(number) + 1, when), listed[0]), listed
    assert re.match(r' *%s  %s  %s  main +\d+\.\d s  live$'
                    % (number, app.branch()[:10], when), listed[1]), listed
    check_one_line(server.dockhand('releases', 'nobody'))
    return '\n'.join(listed)

@drill('upstart', 3, 10)
def test_real_one_of_two_pushes_at_once_is_accepted(server, size):
    first, second = server.app('race'), App(server, 'race')
    for turn in range(size):
        first.follow(), second.follow()
        commits = [app.commit({'www/index.html': '%d of %d' % (number, turn)})
                   for number, app in enumerate((first, second))]
        pushed = together(first.push, second.push)
        assert sorted(each.status == 0 for each in pushed) == [False, True], pushed
        winner = [each.status for each in pushed].index(0)
        answer = '%d of %d' % (winner, turn)
        assert (first.branch(), first.answer()) == (commits[winner], answer)
        assert server.ok('docker run --rm race:latest cat /www/index.html') == answer
        check_refusal(pushed[1 - winner], 'another push went live: pull, then push again')

@drill('upstart')
def test_real_the_push_of_what_was_rolled_back_deploys_it_again(server, size):
    app, commits = Marked(server, 'turned', 8505), {}
    for mark in 'ab':
        app.release(mark)
        commits[mark] = app.branch()
    for words, mark in (('turned', 'a'), ('turned 2', 'b'), ('turned', 'a')):
        server.ok('dockhand rollback ' + words)
        assert (app.check_whole(mark), app.branch()) == (mark, commits[mark])
    assert app.push().status == 0       # of the newer one
    assert (app.check_whole('b'), app.branch()) == ('b', commits['b'])

# ---- Drills: https ---------------------------------------------------------------------

# Against a real authority, in the server itself. What is asked over https is asked by a
# client that trusts that authority alone, so that 200 says that the chain is good too.

RENEW = 'certbot -q renew --force-renewal --no-random-sleep-on-renew'
NGINX_PEM = '/var/lib/dockhand/certificates/%s.pem'
TOKEN = '/.well-known/acme-challenge/token'

def secured(server):
    """An app with https for two of its three names, pushed before it had any, and the
    authority, who cannot look the third one up."""
    authority = server.authority()
    if 'secured' not in server.apps:
        app = server.apps['secured'] = Secured(server, 'secured')
        authority.name('secured.test', 'www.secured.test')
        authority.fails('dead.test')
        server.ok('dockhand config secured '
                  'domains="secured.test www.secured.test dead.test"')
        app.first_push = app.deploy(app.files('a'))
        app.switched_on = server.dockhand('https', 'secured')
    return server.apps['secured'], authority

def serial_of(server, path):
    """The serial number of the certificate in a file, as it is served too."""
    return server.ok('openssl x509 -noout -serial -in "$1"', path)

# An authority that was begun anew knows nobody
REGISTERING = ' --agree-tos --register-unsafely-without-email'

def renew(server, authority, name, options=''):
    """Renew a name's certificate, and wait until the new one is served: (seconds since
    certbot ended, its serial number)."""
    before = authority.serial(name)
    server.ok(RENEW + options + ' --cert-name dockhand-' + name)
    ended = time.time()
    until(lambda: authority.serial(name) not in ('', before), True, 10)
    took, serial = time.time() - ended, authority.serial(name)
    assert serial not in ('', before)
    return took, serial

def pushed_part(text):
    """A file of conf.d without what https adds to it."""
    kept, is_ours = [], False
    for line in text.splitlines():
        is_ours = is_ours or line.strip() == '# dockhand: https, from here'
        if not is_ours:
            kept.append(line)
        is_ours = is_ours and line.strip() != '# dockhand: https, to here'
    return kept

def check_pair(server, name):
    """Key and chain of a name belong together, in a file that root alone reads."""
    key, certificate, mode = server.ok(
        'openssl pkey -in "$1" -pubout | sha256sum; '
        'openssl x509 -in "$1" -noout -pubkey | sha256sum; '
        'stat -c "%a %U" "$1" "${1%/*}" | tr "\\n" " "', NGINX_PEM % name).splitlines()
    assert key == certificate and mode.split() == ['600', 'root', '700', 'root']

def check_token(server, *names, **options):
    """Whoever asks for a token of the authority's gets it, by each scheme."""
    server.ok('mkdir -p "/var/lib/dockhand/acme${1%/*}"; '
              'printf token >"/var/lib/dockhand/acme$1"', TOKEN)
    for scheme in options.get('schemes', ('http', 'https')):
        for name in names:
            answer = server.authority().ask(scheme + '://' + name + TOKEN)
            assert (answer.status, answer.body) == ('200', 'token'), answer
    server.ok('rm "/var/lib/dockhand/acme$1"', TOKEN)

@drill('systemd')
def test_real_https_is_one_command_and_a_name_that_fails_stops_no_other(server, size):
    app, authority = secured(server)
    hints = [line for line in app.first_push.out if 'ssh git@HOST https secured' in line]
    assert len(hints) == 1, app.first_push.out
    on, lines = app.switched_on, app.switched_on.out.splitlines()
    assert on.status == 0 and len(lines) == 3, on
    for name, line in zip(('secured.test', 'www.secured.test'), lines):
        assert re.match(r'%s: https, 18\d\d days left, by Pebble ' % name, line), line
        assert app.says('https://%s/' % name) == '200 a'
        assert app.says('http://%s/a?b=c' % name) == '301 https://%s/a?b=c' % name
        check_pair(server, name)
    assert authority.ask('https://secured.test/').version == '2'

    # the one that the authority cannot look up
    assert re.match(r'dead\.test: no certificate: .*could not resolve', lines[2]), lines
    assert app.says('http://dead.test/') == '200 a'
    assert app.says('https://dead.test/') == '000'

    table = server.ok('dockhand https').splitlines()
    rows = [re.split('  +', line, 2) for line in table if line.startswith('secured ')]
    assert [row[1] for row in rows] == ['secured.test', 'www.secured.test', 'dead.test']
    assert [re.split('[,:]', row[2])[0] for row in rows] == [
        'https', 'https', 'no certificate'], rows
    return ' / '.join(lines)

@drill('systemd')
def test_real_https_shows_no_certificate_to_whom_it_is_not_meant(server, size):
    """And takes no protocol that is broken; what the app was pushed with stays."""
    app, authority = secured(server)
    asked = ['-servername', 'secured.test']
    assert 'BEGIN CERTIFICATE' in authority.handshake('-tls1_2', *asked)
    assert 'BEGIN CERTIFICATE' in authority.handshake('-tls1_3', *asked)
    for options in (['-servername', 'dead.test'], ['-servername', 'elses.test'],
                    ['-noservername'], ['-tls1_1', '-cipher', 'ALL@SECLEVEL=0'] + asked):
        said = authority.handshake(*options)
        assert 'BEGIN CERTIFICATE' not in said and 'SSL alert number' in said, said

    tested = server.run('nginx', '-t')
    assert tested.status == 0 and '[' not in tested.err, tested.err
    installed = server.ok('cat /etc/nginx/conf.d/secured.conf')
    assert 'listen 443 ssl' in installed
    assert 'listen 443' not in '\n'.join(pushed_part(installed))

    # who was sent by a proxy that speaks https itself would be sent here again
    assert app.says('http://secured.test/', '-H', 'X-Forwarded-Proto: https') == '200 a'
    check_token(server, 'secured.test', 'www.secured.test')
    check_token(server, 'dead.test', schemes=('http',))
    return 'nginx says: ' + tested.err.splitlines()[-1]

@drill('systemd')
def test_real_https_that_was_noted_before_comes_with_the_first_push(server, size):
    """Where the authority is away the push is accepted all the same."""
    authority, said = server.authority(), []
    early, late = Secured(server, 'early'), Secured(server, 'late')
    try:
        authority.name('early.test', 'late.test')
        server.ok('dockhand config early domains=early.test; dockhand https early')
        pushed = early.deploy(early.files('a'))
        assert early.mark() == 'a'
        assert pushed.out[-1] == '-----> early: https://early.test/ answers 200'
        said.append(pushed.out[-1])

        authority.stop()
        server.ok('dockhand config late domains=late.test; dockhand https late')
        pushed = late.deploy(late.files('a'))
        assert late.says('http://late.test/') == '200 a'
        told = [line for line in pushed.out if 'late.test has no certificate' in line]
        assert len(told) == 1, pushed.out
        said += told
        early.release('b')

        authority.start()
        server.ok('dockhand https late')
        assert late.mark() == 'a'
        return ' / '.join(said)
    finally:
        authority.start()
        for app in (early, late):
            server.dockhand('destroy', app.name, '--force')

@drill('systemd')
def test_real_no_new_connection_fails_over_https_whatever_changes(server, size):
    app, authority = secured(server)
    serial = authority.serial('secured.test')
    app.release('a')
    with Load(app, tls=6) as load:
        app.release('b')
        server.ok('dockhand rollback secured')
        app.check_whole('a')
        server.ok('dockhand config secured COLOUR=blue')
        app.check_whole('a')
        assert authority.serial('secured.test') == serial
        took, _ = renew(server, authority, 'secured.test')
        time.sleep(1)
    figures = '%s; a new serial %.1f s after a renewal' % (load.check(), took)
    assert load.requests() >= 2000 and took < 10, figures
    return figures

# Has certbot think that a certificate ends soon, or as ever again
DUE = ('sed -i "s/^.*renew_before_expiry = .*/$2/" '
       '/etc/letsencrypt/renewal/dockhand-$1.conf')

@drill('systemd')
def test_real_a_stopped_app_is_renewed_by_what_certbots_timer_starts(server, size):
    app, authority = secured(server)
    before = serial_of(server, NGINX_PEM % 'secured.test')
    live = app.mark()
    server.ok('dockhand stop secured')
    server.ok(DUE + ' && systemctl start certbot.service', 'secured.test',
              'renew_before_expiry = 9999 days')
    server.ok(DUE, 'secured.test', '# renew_before_expiry = 30 days')
    renewed = serial_of(server, NGINX_PEM % 'secured.test')
    server.ok('dockhand start secured')
    app.check_whole(live)
    assert authority.serial('secured.test') == renewed != before
    server.ok('systemctl is-active certbot.timer')
    return '%s, then %s' % (before, renewed)

def recipe(title):
    """The first piece of text that the README says is to be typed under a title."""
    with io.open(os.path.join(HERE, 'README.md'), encoding='utf-8') as file:
        rest = file.read().partition('**%s.**' % title)[2]
    return str(rest.split('```\n')[1])

@drill('systemd')
def test_real_the_recipes_of_the_readme_hold_over_https(server, size):
    """A password, and www redirected, as they are said there, on a proxy file of one's
    own; the way to a certificate is past both."""
    authority, app = server.authority(), Secured(server, 'recipes')
    authority.name('recipes.test', 'www.recipes.test')
    try:
        server.ok('dockhand config recipes domains=recipes.test')
        app.deploy(app.files('a'))
        server.ok('echo "me:$(openssl passwd -apr1 secret)" | '
                  'install -m 640 -g www-data /dev/stdin /etc/nginx/shop.htpasswd')
        proxy = server.ok('dockhand proxy recipes') + '\n'
        opened = proxy.index('server {\n') + len('server {\n')
        proxy = proxy[:opened] + recipe('Basic auth') + proxy[opened:] + (
            recipe('www redirect').replace('example.com', 'recipes.test'))
        app.deploy(dict(app.files('b'), **{'nginx-proxy.conf': proxy}))
        on = server.dockhand('https', 'recipes')
        assert on.status == 0 and on.out.count(': https, ') == 2, on

        plain, secure = 'http://recipes.test/', 'https://recipes.test/'
        assert app.says(plain) == '301 ' + secure
        assert app.says(secure) == '401'
        assert app.says(secure, '-u', 'me:secret') == '200 b'
        assert app.says('http://www.recipes.test/') == '301 https://www.recipes.test/'
        assert app.says('https://www.recipes.test/a') == '301 ' + secure + 'a'
        installed = server.ok('cat /etc/nginx/conf.d/recipes.conf')
        assert proxy in '\n'.join(pushed_part(installed)) + '\n'

        check_token(server, 'recipes.test', 'www.recipes.test')
        renew(server, authority, 'www.recipes.test')
        server.ok('dockhand https recipes --off')
        assert app.says(plain) == '401' and app.says(secure) == '000'
        return on.out.replace('\n', ' / ')
    finally:
        server.dockhand('destroy', 'recipes', '--force')
        server.run('rm', '-f', '/etc/nginx/shop.htpasswd')

def lineages(server):
    """The certificates that certbot would renew."""
    return server.ok('cd /etc/letsencrypt/renewal && ls *.conf || :').split()

@drill('systemd')
def test_real_a_name_more_is_one_order_and_one_less_is_forgotten(server, size):
    """Once no release can be gone back to that has it. A name that fails meanwhile is
    asked for once, however often one pushes."""
    app, authority = secured(server)
    authority.name('more.test')
    authority.fails('never.test')
    names = ['secured.test', 'www.secured.test', 'more.test', 'never.test']
    before = [authority.orders(name) for name in names]

    def more():
        """How many orders there were since then for each of them."""
        return [authority.orders(name) - orders for name, orders in zip(names, before)]
    domains = 'secured.test www.secured.test dead.test'
    server.ok('dockhand config secured domains="%s more.test"' % domains)
    assert app.says('https://more.test/') == '200 ' + app.mark()
    assert more() == [0, 0, 1, 0]
    assert 'dockhand-more.test.conf' in lineages(server)

    server.ok('dockhand config secured domains="%s never.test"' % domains)
    for mark in 'bcdea':
        app.release(mark)
    assert more() == [0, 0, 1, 1]
    assert app.says('https://more.test/') == '000'
    assert 'dockhand-more.test.conf' not in lineages(server)
    assert server.run('test', '-e', NGINX_PEM % 'more.test').status == 1
    server.ok(RENEW)
    server.ok('dockhand config secured domains="%s"' % domains)
    return 'orders for %s: %s' % (', '.join(names), more())

@drill('systemd')
def test_real_a_name_that_leads_elsewhere_is_told_so_and_not_ordered(server, size):
    """But where a person asks for it."""
    authority, app = server.authority(), Secured(server, 'astray')
    elsewhere = server.ok('ip route show default').split()[2]
    authority.lead('astray.test', elsewhere)
    before = authority.orders('astray.test')
    try:
        server.ok('dockhand https astray; dockhand config astray domains=astray.test')
        pushed = app.deploy(app.files('a'))
        told = [line for line in pushed.out if 'astray.test has no certificate' in line]
        assert len(told) == 1 and elsewhere in told[0], pushed.out
        assert authority.orders('astray.test') == before
        assert app.says('http://astray.test/') == '200 a'

        on = server.dockhand('https', 'astray')
        assert on.status == 0 and elsewhere + ' does not lead here' in on.out, on
        assert authority.orders('astray.test') == before + 1
        return told[0] + ' / ' + on.out
    finally:
        server.dockhand('destroy', 'astray', '--force')

# A root of one's own, and what it signs: one that ends in 30 days for each word, good for
# its names (which are parted by commas); one that has ended.
OWN_ROOT = '''
mkdir -p /root/own && cd /root/own && rm -f *
openssl req -x509 -newkey rsa:2048 -nodes -days 99 -subj "/CN=One's own root" \
    -keyout root.key -out root.pem 2>/dev/null
signed() {
    openssl req -newkey rsa:2048 -nodes -subj "/CN=$1" -keyout "$1.key" \
        -out "$1.csr" 2>/dev/null
    echo "subjectAltName=$3" >"$1.cnf"
    openssl x509 -req -in "$1.csr" -CA root.pem -CAkey root.key -CAcreateserial \
        -days "$2" -extfile "$1.cnf" -out "$1.pem" 2>/dev/null
    cat "$1.pem" "$1.key" >"$1"
}
signed wildcard 30 'DNS:brought.test,DNS:*.brought.test'
signed elses 30 DNS:elses.test
signed ended 0 DNS:brought.test
cat wildcard.pem elses.key >foreign
head -n 5 wildcard >torn
while openssl x509 -in ended -noout -checkend 0 >/dev/null; do sleep 0.1; done
'''
NOT_TAKEN = [('foreign', 'belong'), ('ended', 'expired|ended'), ('elses', 'none|covers'),
             ('torn', 'certificate|key'), ('wildcard.pem', 'key')]

@drill('systemd')
def test_real_a_certificate_that_somebody_brings_is_used_or_refused(server, size):
    """One that is refused changes nothing; one that is taken is for all its names."""
    authority, app, said = server.authority(), Secured(server, 'brought'), []
    names = ['brought.test', 'a.brought.test', 'b.brought.test', 'other.test']
    server.ok(OWN_ROOT)

    def bring(file):
        return server.dockhand('https', 'brought', '--cert',
                               stdin=server.ok('cat /root/own/' + file) + '\n')
    try:
        server.ok('dockhand config brought domains="$1"; '
                  'install -d -m 700 /var/lib/dockhand/certificates/own',
                  ' '.join(names))
        app.deploy(app.files('a'))
        paths = ('/etc/nginx', '/var/lib/dockhand/certificates',
                 '/var/lib/dockhand/apps/brought')
        before = server.manifest(*paths)
        for file, reason in NOT_TAKEN:
            outcome = bring(file)
            assert outcome.status == 1 and re.search(reason, outcome.err), outcome
            assert len(outcome.err.splitlines()) == 1
            assert server.manifest(*paths) == before
            said.append(outcome.err)

        taken = bring('wildcard')
        assert taken.status == 0, taken
        for name in names[:3]:
            assert app.says('https://%s/' % name, '--cacert', '/root/own/root.pem') == (
                '200 a')
        assert authority.serial(names[1]) == serial_of(server, '/root/own/wildcard.pem')
        assert app.says('https://other.test/') == '000'
        assert app.says('http://other.test/') == '200 a'
        assert not any(map(authority.orders, names))
        return ' / '.join(said + taken.out.splitlines())
    finally:
        server.dockhand('destroy', 'brought', '--force')

# Waits for certbot, then until a file is there or some seconds are over, and kills it
# with all of its process group. The loop starts no process, or it would come too late.
CERTBOT_KILLER = '''
for _ in $(seq 500); do pid=$(pgrep -o -x certbot) && break; sleep 0.01; done
over=$(mktemp -u)
(sleep "$2"; : >"$over") &
until [ -e "/etc/letsencrypt/$1" ] || [ -e "$over" ]; do kill -0 "$pid" || exit; done
kill -STOP "$pid" && kill -9 "-$(ps -o pgid= -p "$pid" | tr -d ' ')" && echo killed'''

def kill_certbot(server, command, seconds, file='none'):
    """Run a command, and kill the certbot that it starts after so long, or once a file of
    certbot's is there; whether it was."""
    killed, _ = together(
        functools.partial(server.run, 'sh', '-c', CERTBOT_KILLER, 'sh', file,
                          '%.2f' % seconds),
        functools.partial(server.run, 'sh', '-c', command))
    return killed.out == 'killed'

# A renewal that is killed when all is written down and dockhand's hook has not run yet,
# and the links that it would have left a moment before: the new key, and the old chain.
KILLED_LATE = '''
cd /etc/letsencrypt
printf '#!/bin/sh\nrm "$0"; pkill -9 -x certbot\n' >renewal-hooks/deploy/1
chmod 755 renewal-hooks/deploy/1
! certbot -q renew --force-renewal --no-random-sleep-on-renew \
    --cert-name dockhand-killed.test && [ ! -e renewal-hooks/deploy/1 ] || exit 1
cd live/dockhand-killed.test
for file in cert privkey chain fullchain; do
    ln -s /etc/letsencrypt/archive/dockhand-killed.test/${file}1.pem previous_$file.pem
done
ln -sf ../../archive/dockhand-killed.test/fullchain1.pem fullchain.pem'''

def check_whole_again(server, app, names):
    """After a kill of certbot, and then, when certbot has run once more, as it does twice
    a day, that what it has is served."""
    authority = server.authority()
    tested = server.run('nginx', '-t', '-q')
    assert tested == (0, '', ''), tested
    server.ok('systemctl restart nginx')
    for file in server.ok('cd /var/lib/dockhand/certificates && ls').split():
        if file.endswith('.pem'):
            check_pair(server, file[:-len('.pem')])

    again = server.dockhand('https', 'killed')
    assert again.out.count(': https, ') == len(names), again
    assert app.mark() == 'a' and app.says('https://%s/' % names[-1]) == '200 a'
    server.ok('certbot -q renew --no-random-sleep-on-renew; dockhand https killed')
    for name in names:
        assert authority.serial(name) == serial_of(
            server, '/etc/letsencrypt/live/dockhand-%s/cert.pem' % name), name

@drill('systemd', 2, 19)
def test_real_certbot_killed_in_mid_run_leaves_what_nginx_can_read(server, size):
    """In a renewal at its worst moment, in a first order at its worst one, and then in
    both by turns at any."""
    authority, app = server.authority(), Secured(server, 'killed')
    generator, names, struck = random.Random(SEED), ['killed.test'], 0
    authority.name(*names)
    try:
        server.ok('dockhand config killed domains=killed.test; dockhand https killed')
        app.release('a')
        server.ok(KILLED_LATE)
        check_whole_again(server, app, names)

        for turn in range(size):
            if turn % 2:
                struck += kill_certbot(
                    server, RENEW + ' --cert-name dockhand-killed.test',
                    generator.random() * 3)
            else:
                names.append('killed%d.test' % turn)
                authority.name(names[-1])
                struck += kill_certbot(
                    server, 'dockhand config killed domains="%s"' % ' '.join(names),
                    generator.random() * 3 if turn else 9,
                    'none' if turn else 'renewal/dockhand-%s.conf' % names[-1])
            check_whole_again(server, app, names)
        assert sorted(name for name in lineages(server) if 'killed' in name) == sorted(
            'dockhand-%s.conf' % name for name in names)
        assert struck >= size / 2.0
        return '%d of %d times certbot was killed, besides the first' % (struck, size)
    finally:
        server.dockhand('destroy', 'killed', '--force')

@drill('systemd', 1, 20)
def test_real_killed_pushes_leave_https_as_it_is(server, size):
    app, authority = secured(server)
    names = ['secured.test', 'www.secured.test']
    serials = [authority.serial(name) for name in names]
    begun = time.time()
    app.release('b')
    seconds = 1.3 * (time.time() - begun)       # what comes when it is live counts too

    def killed(moment):
        server.ok(KILLER, str(moment))

    def recover():
        server.ok('dockhand recover')
        assert [authority.serial(name) for name in names] == serials
    with Watch(server, app) as watch:
        said = interrupt(app, size, seconds, killed, recover)
    assert [authority.serial(name) for name in names] == serials
    return '%s; %s' % (said, watch.figures())

@drill('systemd')
def test_real_https_stays_when_a_file_or_certbot_goes(server, size):
    """A file that is lost costs its name https and nginx nothing, and is taken from what
    certbot has; where that is purged all goes on."""
    app, authority = secured(server)
    file = NGINX_PEM % 'www.secured.test'
    app.release('a')

    # the authority does not come back from the reboot, so nothing can be ordered
    server.ok('rm "$1"', file)
    server.reboot()
    assert until(app.mark, 'a') == 'a'
    assert app.says('http://www.secured.test/') == '200 a'
    assert app.says('https://www.secured.test/') == '000'
    server.ok('nginx -t -q && dockhand https secured')
    assert app.says('https://www.secured.test/') == '200 a'
    check_pair(server, 'www.secured.test')

    server.ok('DEBIAN_FRONTEND=noninteractive apt-get -q -y purge certbot && '
              'systemctl restart nginx')
    app.release('b')
    for name in ('secured.test', 'www.secured.test'):
        assert app.says('https://%s/' % name) == '200 b'
    examined = server.dockhand('doctor')
    assert examined.status == 1 and 'apt-get install certbot' in examined.out, examined

    authority.begin()
    server.ok('dockhand https secured')
    assert len([name for name in lineages(server) if 'secured' in name]) == 2
    return 'doctor says: ' + examined.out.replace('\n', ' / ')

# ---- Drills: plain apps ----------------------------------------------------------------

# Apps as people bring them: files for the nginx of a base image; Python, its packages by
# pip, without a word of its port; Node, with a stage that builds. What each is called, what
# it answers, and what dockhand has to be told before.
USUAL = [('pages', 'A page among others', [], {
    'Dockerfile': '''\
FROM nginx
COPY pages/ /usr/share/nginx/html/
''',
    'pages/index.html': 'A page among others\n'}),
         ('weather', 'Rain until noon', ['port=8000'], {
    'Dockerfile': '''\
FROM python:3
ENV PYTHONUNBUFFERED=1
WORKDIR /srv/weather
COPY packages.txt .
RUN pip install --quiet --requirement packages.txt
COPY weather.py start.sh ./
USER nobody
ENTRYPOINT ["sh", "start.sh"]
CMD [ "weather:app" ]
''',
    'packages.txt': 'flask\ngunicorn\n',
    'weather.py': 'from flask import Flask\n\napp = Flask(__name__)\n\n'
                  '@app.route("/")\ndef today():\n    return "Rain until noon"\n',
    'start.sh': 'exec gunicorn --bind "0.0.0.0:$PORT" --worker-tmp-dir /tmp "$@"\n'}),
         ('rooms', 'Three rooms are free', [], {
    'Dockerfile': '''\
FROM node:16 AS build
ARG free=Three
WORKDIR /build
COPY package*.json ./
RUN npm install --offline --no-audit
COPY . .
RUN node render.js $free > page.txt

FROM node:16
LABEL what="rooms, and how many of them are free"
ENV NODE_ENV=production
COPY --from=build /build/page.txt /build/server.js /build/healthy.js /rooms/
WORKDIR /rooms
EXPOSE 8080
HEALTHCHECK --interval=1s --retries=30 \\
    CMD ["node", "healthy.js"]
CMD node server.js
''',
    'package.json': '{"name": "rooms", "version": "0.3.0", "private": true}\n',
    'healthy.js': 'require("http").get("http://127.0.0.1:8080", '
                  '(heard) => process.exit(heard.statusCode - 200));\n',
    'render.js': 'console.log(process.argv[2] + " rooms are free");\n',
    'server.js': 'const page = require("fs").readFileSync("page.txt", "utf8").trim();\n'
                 'require("http").createServer((asked, answer) => answer.end(page))'
                 '.listen(8080);\n'})]

@drill('none')
def test_real_dockerfiles_of_the_usual_kinds_need_nothing_for_dockhand(server, size):
    server.bases()
    said = []
    for name, answer, config, files in USUAL:
        app = App(server, name)
        if config:
            server.ok('dockhand config "$@"', name, *config)
        for turn in range(2):                   # the second one beside the first
            pushed = app.deploy(dict(files, turn='%d' % turn))
            assert app.answer() == answer
        said += re.findall(r'Release .*\S', pushed.err)
        assert ', no gap' in pushed.err, pushed.err
        server.ok('dockhand destroy $1 --force', name)
    return ' / '.join(said)

@drill('none', 3, 10)
def test_real_every_row_that_postgresql_acknowledged_is_there_whatever_happens(
        server, size):
    server.bases()
    app, gaps = Database(server, 'data'), []
    app.begin()

    def deploy(number):
        said = app.deploy({'mark': '%d' % number}).err
        gaps.append(float(re.search('down for ([0-9.]+) s', said).group(1)))

    def prune():
        server.ok('docker system prune -f')
        server.ok('dockhand stop writer && dockhand stop data && '
                  'docker system prune -f && ! docker network inspect dockhand && '
                  'dockhand start data && dockhand start writer')
    events = [functools.partial(deploy, number + 1) for number in range(size)] + [
        lambda: server.ok('dockhand rollback data'), server.reboot, prune,
        functools.partial(deploy, size + 1)]
    count = app.check(0)
    for event in events:
        event()
        count = app.check(count)
    server.ok('dockhand destroy writer --force --volumes && '
              'dockhand destroy data --force --volumes')
    return '%d rows acknowledged, none lost; down for %s s in deploys' % (
        count, ' '.join('%.1f' % gap for gap in gaps))

def roll(app, deploys, rollbacks):
    """So many deploys, rollbacks spread among them; how many seconds each took."""
    took, every = [], deploys // rollbacks
    for turn in range(1, deploys + 1):
        app.follow()
        app.commit(app.files('r%d' % turn))
        acts = [(app.push, 'r%d' % turn)]
        if turn % every == 0:
            acts.append((lambda: app.server.dockhand('rollback', app.name),
                         'r%d' % (turn - 1)))
        for act, mark in acts:
            begun = time.time()
            outcome = act()
            took.append(time.time() - begun)
            assert outcome.status == 0 and app.mark() == mark, outcome
    return took

@drill('none', 3, 10)
def test_real_the_processes_of_an_app_are_one_release_through_whatever_comes(server, size):
    """Deploys under load, a rollback, more and fewer of them, a stop, a reboot; workers on
    a queue tell by their connections to it when they lived."""
    server.bases()
    app = Typed(server, 'typed')
    first = app.deploy(app.files('r0'))
    assert 'typed r0' in str(first.out) and 'migrates to typed r0' in first.err, first.err
    with Queue(server) as queue:
        with Load(app, new=4, slow=1, kept=2) as load:
            for turn in range(1, size + 1):
                app.release('r%d' % turn)
            server.ok('dockhand rollback typed')
            app.check_whole('r%d' % (size - 1))
            server.ok('dockhand config typed scale="web=2 worker=3"')
            app.WHOLE = ['mailer', 'web', 'web', 'worker', 'worker', 'worker']
            app.release('scaled')
            apps = server.ok('dockhand apps')
            assert 'web=2 worker=3 mailer=1' in apps, apps
            upstream = server.ok('sed -n "/^upstream typed/,/^}/p" '
                                 '/etc/nginx/conf.d/typed.conf')
            assert upstream.count(' server ') == 2, upstream
            app.WHOLE = ['web', 'web', 'worker', 'worker', 'worker']
            fewer = app.files('fewer')['Procfile'].replace('mailer:', '# mailer:')
            app.deploy(app.files('fewer', Procfile=fewer))
            app.check_whole('fewer')
        requests = load.check()

        server.ok('dockhand stop typed')
        assert app.running() == [] and app.mark() == ''
        server.ok('dockhand start typed && dockhand restart typed')
        app.check_whole('fewer')
        assert 'worker' not in server.ok('dockhand logs typed worker.2')
    handled = queue.check()

    server.reboot()
    server.ok('dockhand recover')           # as init does where there is one
    with Queue(server) as queue:
        app.check_whole('fewer')
        app.WHOLE = Typed.WHOLE
        server.ok('dockhand config typed --unset scale')
        app.release('last')
    server.ok('dockhand destroy typed --force')
    return '%s; %s; after a reboot %s' % (requests, handled, queue.check())

@drill('none', 4, 20)
def test_real_killed_pushes_leave_the_workers_of_one_release(server, size):
    server.bases()
    app = Typed(server, 'struck')
    app.release('first')
    begun = time.time()
    app.release('second')
    seconds = time.time() - begun

    def killed(moment):
        strike = time.time()
        struck = server.ok(KILLER, str(moment))
        print('%.1f to %.1f killed after %.2f: %s' % (strike, time.time(), moment, struck))
    with Queue(server) as queue:
        said = interrupt(app, size, seconds, killed,
                         lambda: server.ok('dockhand recover'))
    server.ok('dockhand destroy struck --force')
    return '%s; %s' % (said, queue.check(killed=size))

# Ends 20 s after it is told to, and says so
SLOW_TO_END = {
    'Dockerfile': 'FROM python:3\nCOPY end.py /\nCMD ["python3", "/end.py"]\n', 'end.py': '''
import signal, sys, time
def end(*_):
    time.sleep(20)
    sys.exit(open('/data/ended', 'a').write('in order\\n') and 0)
signal.signal(signal.SIGTERM, end)
while True:
    time.sleep(1)
'''}
GREEDY = {
    'Dockerfile': 'FROM python:3\nCOPY take.py /\nCMD ["python3", "/take.py"]\n',
    'take.py': 'import os, time\ntime.sleep(float(open("/take.py").read()[-2:]))\n'
               'taken = [b"x" * 10 ** 8 for _ in range(9)]\ntime.sleep(9999)\n#00'}

# Until docker stops a worker, then kill who had it stop
STRIKE_STOP = '''
for _ in $(seq 3000); do pgrep -f '^docker stop .*--worker' >/dev/null && break; sleep 0.01; done
sleep 0.5; pkill -KILL -f '^[^ ]*python3 .*dockhand/receive'; pkill -KILL -f '^docker stop .*--worker'
'''

@drill('none')
def test_real_a_worker_that_was_just_being_stopped_by_a_killed_push_runs_again(
        server, size):
    server.bases()
    app = Typed(server, 'leaving')
    stubborn = ('web: python3 /answer.py\nworker: trap "" TERM; while :; do sleep 1; done\n')
    app.WHOLE = ['web', 'worker']
    app.deploy(app.files('a', Procfile=stubborn))
    app.check_whole('a')
    app.commit(app.files('b', Procfile=stubborn))
    pushed, _ = together(app.push, lambda: server.ok(STRIKE_STOP))
    server.ok('dockhand recover')
    time.sleep(12)
    assert pushed.status and app.check_whole('a')
    server.ok('dockhand destroy leaving --force')
    return 'it runs 12 s later'

@drill('none')
def test_real_options_of_docker_are_in_force(server, size):
    """A limit of memory, a folder of the server's, a published port, the time to end."""
    server.bases()
    app = App(server, 'greedy')
    server.ok('dockhand config greedy options="--memory 64m --memory-swap 64m"')
    app.commit(GREEDY)
    pushed = app.push()
    assert pushed.status == 1 and re.search(
        'it does not run: exited with 137, out of memory: the kernel killed it',
        pushed.err), pushed.err

    app.deploy({'take.py': GREEDY['take.py'][:-2] + '05'})
    assert server.inside(app, '{{.HostConfig.Memory}}') == '%d' % (64 << 20)
    listed = until(lambda: re.search(
        r'greedy .*started again \d+ times?, out of memory: the kernel killed it',
        server.ok('dockhand apps')) is not None, True, 60)
    assert listed, server.ok('dockhand apps')
    server.ok('dockhand destroy greedy --force')

    app = App(server, 'slow')
    server.ok('mkdir -p /srv/slow && dockhand config slow '
              'options="-v /srv/slow:/data --stop-timeout 60 -p 2526:25"')
    app.deploy(SLOW_TO_END)
    assert server.inside(app, '{{.HostConfig.PortBindings}}') == 'map[25/tcp:[{ 2526}]]'
    again = app.deploy({'x': 'y'})
    down = float(re.search('down for ([0-9.]+) s', again.err).group(1))
    assert 20 < down < 40
    assert server.ok('cat /srv/slow/ended') == 'in order'
    server.ok('dockhand destroy slow --force')
    assert server.ok('cat /srv/slow/ended') == 'in order\nin order'
    server.ok('rm -r /srv/slow')
    return 'killed for memory, and said so; down for %.1f s of a stop of 20' % down

# Prints its release and a number, 50 times a second, and a long line now and then
COUNTING = ('FROM tiny:1\nCOPY count /\nCMD ["sh", "/count"]\n', '''
i=0
long=$(busybox head -c 40000 /dev/zero | busybox tr '\\0' x)
while :; do
    i=$((i+1))
    echo "%s $i"
    [ $((i %% 100)) != 0 ] || echo "%s $i.5 $long"
    busybox usleep 20000
done
''')

class Counting(Plain):
    def files(self, mark):
        return {'Dockerfile': COUNTING[0], 'count': COUNTING[1] % (mark, mark)}

def counted(text):
    """{release: [number]} of what a follower has shown; each long line is whole, but for
    one at the beginning: docker counts the pieces of 16 KB that it keeps as lines."""
    found = {}
    lines = text.splitlines()
    for line in lines[1:] if ' ' not in lines[0] else lines:
        words = line.split(' ')
        if words[1].endswith('.5'):
            assert words[2] == 'x' * 40000 and len(words) == 3
        else:
            found.setdefault(words[0], []).append(int(words[1]))
    return found

def followers(server):
    return server.ok("ps -eo args= | grep -c '^docker logs .*[c]ounting' || :")

@drill('upstart', 3, 10)
def test_real_logs_go_on_over_deploys_and_end_with_their_reader(server, size):
    app = Counting(server, 'counting')
    app.deploy(app.files('r0'))
    reader = subprocess.Popen(['ssh', '-F', server.config, 'main', 'logs counting -f -n 5'],
                              stdout=subprocess.PIPE)
    heard = []
    thread = threading.Thread(target=lambda: heard.append(reader.stdout.read()))
    thread.start()
    for turn in range(1, size + 1):
        app.deploy(app.files('r%d' % turn))
    server.ok('dockhand rollback counting && dockhand restart counting && sleep 3')
    assert followers(server) != '0'
    reader.terminate()
    thread.join()
    reader.wait()
    assert until(lambda: followers(server), '0', 10) == '0'

    found, lines = counted(heard[0].decode()), 0
    assert sorted(found) == sorted('r%d' % turn for turn in range(size + 1))
    for mark, numbers in found.items():
        assert numbers[0] == 1 or mark == 'r0', mark
        starts = [at for at, number in enumerate(numbers) if number == 1]
        for begin, end in zip([0] + starts, starts + [len(numbers)]):
            part = numbers[begin:end]
            lines += len(part)
            assert part == list(range(part[0], part[0] + len(part))) if part else True, mark
    server.ok('dockhand destroy counting --force')
    return '%d lines over %d deploys, a rollback and a restart, none missing, none twice' % (
        lines, size)

# Prints 100 MB, and then waits
LARGE_LOG = {'Dockerfile': 'FROM tiny:1\nCMD ["sh", "-c", "busybox yes \\"$(busybox seq -s - '
                           '40)\\" | busybox head -c 100000000; exec sleep 9999"]\n'}
PEAK = r'''
dockhand logs large -n 9999999 >/root/large.out & pid=$!
while kill -0 $pid 2>/dev/null; do
    peak=$(sed -n 's/^VmHWM:[^0-9]*\([0-9]*\) kB/\1/p' /proc/$pid/status 2>/dev/null || :)
    [ -z "$peak" ] || most=$peak
    sleep 0.02
done
echo "$most" $(wc -c </root/large.out); rm /root/large.out'''

@drill('upstart')
def test_real_a_large_log_is_shown_in_little_memory(server, size):
    app = App(server, 'large')
    server.ok('dockhand config large options="--log-opt max-size=200m"')
    app.deploy(LARGE_LOG)
    log = "docker inspect -f '{{.LogPath}}' $(docker ps -q --filter name=large--)"
    server.ok('for _ in $(seq 600); do [ $(stat -c %%s $(%s)) -lt 100000000 ] || exit 0; '
              'sleep 0.1; done; exit 1' % log)
    time.sleep(3)
    kilobytes, count = [int(word) for word in server.ok(PEAK).split()]
    server.ok('dockhand destroy large --force')
    assert count >= 99000000 and kilobytes < 40000
    return '%d MB of log in %d MB of memory' % (count // 10 ** 6, kilobytes // 1000)

@drill('upstart')
def test_real_run_passes_all_on_and_leaves_nothing(server, size):
    app = Plain(server, 'once')
    app.deploy(app.files('a'))
    app.deploy(app.files('b'))

    def one_offs():
        return server.ok('docker ps -a --format "{{.Names}}" | grep -c -- --run- || :')
    for command, status in (('true', 0), ('sh -c "exit 3"', 3), ('sh -c "kill -9 $$"', 137),
                            ('nothing-like-it', 127)):
        ran = server.ssh('main', 'run once ' + command.replace('"', "'"))
        assert ran.status == status, (command, ran)

    data = os.urandom(10 ** 7)
    asked = ['ssh', '-F', server.config, 'main', 'run once cat']
    assert subprocess.run(asked, input=data, stdout=subprocess.PIPE).stdout == data

    beside = subprocess.Popen(['ssh', '-F', server.config, 'main', 'run once sleep 999'],
                              stdin=subprocess.DEVNULL)
    assert until(one_offs, '1') == '1'
    pushed = app.deploy(app.files('c'))
    assert re.search('Note: once--2--run-[0-9a-f]{8} goes on', pushed.err), pushed.err
    for verb in ('stop once', 'start once', 'restart once', 'rollback once'):
        assert server.ssh('main', verb).status == 0
    assert server.dockhand('recover').status == 0 and one_offs() == '1'
    beside.kill()
    beside.wait()
    assert until(one_offs, '0', 10) == '0'
    assert server.ssh('main', 'enter once cat /www/index.html').out == 'once b'

    killed = subprocess.Popen(['ssh', '-F', server.config, 'main', 'run once sleep 998'],
                              stdin=subprocess.DEVNULL)
    assert until(one_offs, '1') == '1'
    server.ok("pkill -KILL -f '[r]eceive command main'")
    killed.kill()
    killed.wait()
    assert one_offs() == '1'
    server.ok('dockhand restart once')
    assert one_offs() == '0'
    server.ok('dockhand destroy once --force')
    return 'exit codes 0 3 137 127, 10 MB, a push, a stop and a rollback beside it'

BUILT = ('FROM tiny:1 AS base\nARG WORD\nRUN echo "$WORD" >/word\nEXPOSE 80\n'
         'CMD ["httpd", "-f", "-h", "/www"]\nFROM base AS prod\nCOPY www /www\n'
         'FROM prod AS after\nRUN false\n')
SECRET = 'hush-%d' % SEED

@drill('upstart')
def test_real_words_of_docker_build_are_what_is_built(server, size):
    """An argument, a stage and a label, with the older builder; a secret, which is in no
    layer, with BuildKit."""
    app, path = App(server, 'built'), 'docker/prod.Dockerfile'
    words = '--build-arg WORD --target prod --label of=shop -f ' + path
    server.ok('dockhand config built WORD=word build="$1"', words)
    app.deploy({path: BUILT, 'www/index.html': 'built'})
    assert app.answer() == 'built'

    read = 'docker exec $(docker ps -q --filter ancestor=built:latest) cat /word'
    label = 'docker inspect -f "{{.Config.Labels.of}}" built'
    assert (server.ok(read), server.ok(label)) == ('word', 'shop')
    server.ok('dockhand config built WORD=other')       # builds the live commit again
    assert (server.ok(read), app.answer()) == ('other', 'built')

    server.ok('dockhand config built TOKEN=-', stdin=SECRET)
    server.ok('dockhand config built build="$1"', words + ' --secret id=npm,env=TOKEN')
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    secretive = BUILT.replace(
        'COPY', 'RUN --mount=type=secret,id=npm busybox sha256sum /run/secrets/npm | '
                'busybox grep -q %s && echo seen >/seen\nCOPY' % digest)
    pushed = app.deploy({path: secretive, 'www/index.html': 'with it'})
    assert app.answer() == 'with it'
    assert server.ok(read.replace('/word', '/seen')) == 'seen'
    kept = server.ok('docker save built | grep -ac "$1" || :; docker history --no-trunc '
                     'built | grep -c "$1" || :', SECRET)
    assert kept.split() == ['0', '0'] and SECRET not in pushed.err
    outcome = server.dockhand('config', 'built', '--unset', 'TOKEN')
    assert outcome.status == 1 and 'build names TOKEN' in outcome.err, outcome
    server.ok('dockhand destroy built --force')
    return 'an argument, a stage, a label; a secret, and none of it in a layer'

@drill('upstart')
def test_real_two_apps_of_one_repository_are_two_folders_of_it(server, size):
    shop, api = App(server, 'front'), App(server, 'api')
    files = dict(('%s/%s' % (folder, name), text) for app, folder in (
        (shop, 'web'), (api, 'services/api')) for name, text in (
            ('Dockerfile', REAL_WEB + 'EXPOSE 80\nCMD ["httpd", "-f", "-h", "/www"]\n'),
            ('www/index.html', app.name)))
    shop.commit(files)
    said = shop.push()
    assert said.status == 1 and re.search(
        'no Dockerfile at the top of this commit, but in `web`: ssh git@HOST config front '
        '--next folder=web', said.err), said.err

    server.ok('dockhand config front folder=web && dockhand config api folder=services/api')
    for remote in (shop.remote, api.remote):
        pushed = server.git('push', remote, 'main', cwd=shop.folder)
        assert pushed.status == 0, pushed.err
    assert (shop.answer(), api.answer()) == ('front', 'api')

    shop.commit({'web/www/index.html': 'changed'})
    assert 'Nothing below web' not in shop.push().err and shop.answer() == 'changed'
    pushed = server.git('push', api.remote, 'main', cwd=shop.folder)
    assert 'Nothing below services/api has changed' in pushed.err, pushed.err
    assert pushed.status == 0 and api.answer() == 'api'
    server.ok('dockhand destroy front --force && dockhand destroy api --force')
    return 'two folders of one repository are two apps'

GRPC_SERVER = '''
import grpc
from concurrent import futures
def say(request, context):
    return b'hello ' + request
def count(request, context):
    for number in range(3):
        yield request + b'%d' % number
class Handler(grpc.GenericRpcHandler):
    def service(self, called):
        if called.method == '/Echo/Say':
            return grpc.unary_unary_rpc_method_handler(say)
        return grpc.unary_stream_rpc_method_handler(count)
server = grpc.server(futures.ThreadPoolExecutor(4))
server.add_generic_rpc_handlers([Handler()])
server.add_insecure_port('0.0.0.0:8080')
server.start()
server.wait_for_termination()
'''
GRPC_CLIENT = '''
import grpc, sys
options = [('grpc.default_authority', 'grpc.test')]
if sys.argv[1] == 'tls':
    root = grpc.ssl_channel_credentials(open('/root.pem', 'rb').read())
    options += [('grpc.ssl_target_name_override', 'grpc.test')]
    channel = grpc.secure_channel('127.0.0.1:443', root, options)
else:
    channel = grpc.insecure_channel('127.0.0.1:50051', options)
print(channel.unary_unary('/Echo/Say')(b'you', timeout=10).decode(),
      *[part.decode() for part in channel.unary_stream('/Echo/Count')(b'n', timeout=10)])
'''

@drill('none')
def test_real_grpc_is_passed_on_by_the_recipe_of_the_readme(server, size):
    server.bases()
    app = App(server, 'grpc')
    proxy = recipe('gRPC').replace('example.com', 'test')
    proxy = proxy.replace('grpc://shop', 'grpc://grpc')
    files = {'Dockerfile': 'FROM python:3\nCOPY serve.py /\nEXPOSE 8080\n'
                           'CMD ["python3", "/serve.py"]\n', 'serve.py': GRPC_SERVER}

    def call(way):
        return server.ok('docker run --rm -i --network host -v /root/grpc.pem:/root.pem '
                         'python:3 python3 - $1', way, stdin=GRPC_CLIENT)
    made = ('openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=grpc.test -addext '
            'subjectAltName=DNS:grpc.test -keyout /root/grpc.key -out /root/grpc.pem')
    try:
        server.ok(made + ' 2>/dev/null')
        app.deploy(dict(files, **{'nginx-proxy.conf': proxy}))
        server.ok('cat /root/grpc.pem /root/grpc.key | dockhand https grpc --cert')
        said = [call('tls')]
        own_port = proxy.replace('listen 80;', 'listen 50051 http2;')
        server.ok('dockhand https grpc --off')
        app.deploy({'nginx-proxy.conf': own_port})
        said.append(call('plain'))
        assert said == ['hello you n0 n1 n2'] * 2, said
        return ' / '.join(said)
    finally:
        server.run('dockhand', 'destroy', 'grpc', '--force')

@drill('none', 4, 30)
def test_real_no_request_fails_in_deploys_and_rollbacks(server, size):
    server.bases()
    app = Busy(server, 'busy')
    app.release('r0')
    with Load(app, new=4, slow=2, upload=2, late=4, kept=4) as load:
        took = roll(app, size, size // 3)
    figures = '%d deploys and rollbacks, %.1f s at the median; %s' % (
        len(took), sorted(took)[len(took) // 2], load.check())
    assert load.requests() >= (20000 if size > 4 else 2000), figures
    return figures

# Where no system's log is, as without an init: keeps what it gets, a line each
SYSTEM_LOG = '''
import os, socket
listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
listener.bind('/dev/log')
with open('/root/system.log', 'ab', 0) as log:
    while True:
        log.write(listener.recv(65536).rstrip(b'\\n\\0') + b'\\n')
'''

# Each minute: when it ran, and of which release; then one that is not over in a minute
TICKS = '''* * * * * echo $(busybox date +\\%s) $(cat /www/index.html) >>/ticks/all; echo ticked
* * * * * sleep 70
'''

class Ticking(Plain):
    """A web app with a crontab, which overlaps though it keeps what its lines write."""

    def files(self, mark):
        files = Plain.files(self, mark, crontab=TICKS + '@yearly true %s\n' % mark)
        files['Dockerfile'] += 'VOLUME /ticks\n'
        return files

    def ticks(self):
        """[(minute since 1970, release)] of all that ran."""
        path = '/var/lib/docker/volumes/ticking--ticks/_data/all'
        lines = self.server.ok('cat ' + path).splitlines()
        return [(int(line.split()[0]) // 60, line.split()[-1]) for line in lines]

def wait_for_second(second):
    """Until the clock shows so many seconds past a minute."""
    time.sleep((second - time.time()) % 60)

def test_real_what_a_line_of_a_crontab_prints_is_in_the_journal(servers):
    """As cron runs it, but now: what cron.d holds after the times and the user."""
    server = servers['systemd']
    app = Plain(server, 'dotted.name')
    app.deploy(app.files('a', crontab='15 4 * * * echo said; echo wrong >&2; exit 3\n'))
    server.ok("sed -n 's/^15 4 .* root //p' /etc/cron.d/dockhand-dotted--name | sh")

    def missing():
        said = server.ok('journalctl -t dockhand/dotted.name -o cat').splitlines()
        return set(['crontab:1: exit status 3 (dotted.name--1)', 'said', 'wrong']) - set(said)
    assert until(missing, set()) == set()
    server.ok('dockhand destroy dotted.name --force')

@drill('none', 3, 12)
def test_real_a_crontab_runs_each_minute_in_whatever_release_is_live(server, size):
    must(['docker', 'exec', '-d', server.name, 'python3', '-c', SYSTEM_LOG])
    server.ok('dockhand config ticking overlap=yes')
    app = Ticking(server, 'ticking')
    wait_for_second(15)
    pushed = app.deploy(app.files('r0'))
    assert 'crontab: 3 lines, by the clock of this server (' in pushed.err
    live, first, right = 'r0', int(time.time() // 60) + 1, {}

    for turn in range(1, size + 1):
        # Every other one is under way when the minute ends: either release is right then
        wait_for_second([58, 30][turn % 2])
        minute, before = int(time.time() // 60) + 1, live
        if turn % 3 == 0:
            server.ok('dockhand rollback ticking 2>&1')
            live = 'r%d' % (turn - 2)
        else:
            live = 'r%d' % turn
            app.deploy(app.files(live))
        right[minute] = [live] if turn % 2 else [before, live]
        wait_for_second(10)                     # until it has begun
    assert server.dockhand('stop', 'ticking').status == 0
    wait_for_second(10)                         # the next one has

    ticks = app.ticks()
    assert [minute for minute, _ in ticks] == list(range(first, max(right) + 1)), ticks
    wrong = [(minute, mark) for minute, mark in ticks
             if mark not in right.get(minute, [mark])]
    assert not wrong, (wrong, right)
    said = server.ok('grep dockhand/ticking /root/system.log')
    assert said.count('ticked') == said.count('crontab:1: exit status 0') == len(ticks)
    assert 'crontab:2: not started, since it still runs' in said
    server.ok('dockhand destroy ticking --force --volumes')
    assert not server.ok('docker ps -aq --filter name=ticking; '
                         'ls /etc/cron.d | grep ticking || :')
    return '%d minutes, %d deploys and rollbacks, a tick of the right release in each' % (
        len(ticks), size + 1)

@drill('none')
def test_real_a_websocket_lives_until_the_drain_ends(server, size):
    server.bases()
    app, ended = Busy(server, 'socket'), []
    app.release('a')
    connection = socket.create_connection(('127.0.0.1', server.outside[80]), 60)
    connection.sendall(b'GET / HTTP/1.1\r\nHost: socket.test\r\nUpgrade: websocket\r\n'
                       b'Connection: Upgrade\r\n\r\n')
    assert b' 101 ' in connection.recv(4096)

    def echo():
        while time.time() < begun + 120:
            try:
                connection.sendall(b'ping')
                if connection.recv(4096) != b'ping':
                    break
            except EnvironmentError:
                break
            time.sleep(0.05)
        ended.append(time.time())
    begun = time.time()
    together(echo, functools.partial(app.release, 'b'))
    connection.close()
    lived = ended[0] - begun
    assert dh.DRAIN <= lived <= dh.DRAIN + 15, lived
    with Load(app, new=1) as load:
        time.sleep(1)
    load.check()
    return 'it lived for %.1f s of a deploy that drains for %d s at most' % (
        lived, dh.DRAIN)

# What is wrong with a new version, the reason given, and what else the push says.
SPOILED = [
    ({'command': 'HEALTHCHECK --interval=1s --retries=2 CMD false\n'
                 'CMD ["sh", "-c", "echo no disk; exec httpd -f -h /www"]\n'},
     'its HEALTHCHECK says unhealthy', 'no disk'),
    ({'command': 'CMD ["sh", "-c", "echo waiting for a friend; sleep 999"]\n'},
     'after 5 s nothing listens on port 80', 'waiting for a friend'),
    ({'command': 'CMD ["sh", "-c", "echo no database; exit 3"]\n'},
     'it does not run|keeps dying', 'no database'),
    ({'command': 'CMD ["sh", "-c", "httpd -f -h /www & sleep 1; '
                 'echo no memory; exit 3"]\n'},
     'it does not run|keeps dying', 'no memory'),
    ({'www/migrate': 'echo no such table; exit 4\n'}, r'release command failed \(4\)',
     'no such table'),
    ({'command': 'CMD ["httpd", "-f", "-h", "/www", "-p", "127.0.0.1:80"]\n'},
     'after 5 s nothing listens',
     r'listens on 127\.0\.0\.1:80.*make it listen on 0\.0\.0\.0'),
    ({'command': 'CMD ["python3", "-m", "http.server", "8000"]\n'},
     'build failed|does not run', 'python3')]

@drill('none')
def test_real_a_version_that_fails_is_refused_with_its_log_and_no_request(server, size):
    app, said = Plain(server, 'spoiled'), []
    server.ok('dockhand config spoiled timeout=5 release="sh /www/migrate"')
    fine = {'www/migrate': 'echo migrated\n'}
    pushed = app.deploy(app.files('fine', **fine))
    assert any('migrated' in line for line in pushed.out), pushed.err
    with Load(app, new=3, late=2) as load:
        for changes, reason, line in SPOILED:
            begun = time.time()
            pushed = refused(app, app.files('bad', **dict(fine, **changes)), reason, 1)
            assert any(re.search(line, each) for each in pushed.out), pushed.err
            assert app.check_whole('fine') == 'fine'
            said.append('%.1f s: %s' % (time.time() - begun, pushed.out[-1]))
            assert server.ok('docker ps -aq --filter name=^/spoiled--').count('\n') == 0
    return ' / '.join(said + [load.check(dying=True)])

def each_its_own(server, size):
    """Five apps, and a container that somebody put on their network."""
    apps = [Plain(server, 'five%d' % number) for number in range(5)]
    generator = random.Random(SEED)
    for app in generator.sample(apps, 5):
        app.release('a')
    for app in apps[:2]:
        app.release('b')
    server.ok('docker run -d --name elses --restart always --net dockhand '
              'tiny:1 sleep 99999')

    def reboot():
        server.reboot()
        watch.test_nginx()

    def prune():
        server.ok('docker system prune -f')
    orders = generator.sample(list(itertools.permutations(
        [reboot, server.restart_docker, prune])), size)
    try:
        with Watch(server, *apps) as watch:
            for event in itertools.chain(*orders):
                event()
                for app in apps:
                    app.check_whole('b' if app in apps[:2] else 'a')
            for app in apps[:2]:
                server.ok('dockhand rollback ' + app.name)
                app.check_whole('a')
    finally:
        server.ok('docker rm -f elses')
    return '; '.join([' '.join(event.__name__ for event in order) for order in orders] + [
        watch.figures()])

@drill('systemd', 1, 6)
def test_real_each_name_gets_its_own_app_whatever_happens(server, size):
    return each_its_own(server, size)

@drill('upstart', None, 6)
def test_real_each_name_gets_its_own_app_whatever_happens_under_upstart(server, size):
    return each_its_own(server, size)

# What is killed with -9, and what is typed after it. On systemd and Upstart dockhand's
# own job follows each start of docker; nobody hears of nginx where docker did not start.
KILLS = [
    ('dockerd', 'kill -9 $(cat /run/docker.pid)', None),
    ('containerd', 'kill -9 $(pidof containerd)', None),
    ("nginx's master", 'kill -9 $(cat /run/nginx.pid)', 'recover'),
    ("dockerd and nginx's master", 'kill -9 $(cat /run/docker.pid) $(cat /run/nginx.pid)',
     None)]

def kill_again(crowd, times, kill, typed):
    """Kill so often, or until not all is well again; ([seconds], what is missing)."""
    took = []
    for _ in range(times):
        if crowd.server.kind == 'systemd':      # which would give up one killed so often
            crowd.server.ok('systemctl reset-failed docker containerd nginx')
        begun = time.time()
        crowd.server.ok(kill)
        if typed:
            crowd.server.run('timeout', '60', 'dockhand', typed)
        missing = crowd.missing(begun)
        if missing:
            return took, missing
        took.append(max(0, *[since - begun for since in crowd.since.values() if since]))
    return took, ''

def come_back_from_kills(server, size, jobs):
    """So many apps, one in `jobs` of them with its own job, and another to be pushed."""
    (number, times), said, wrong = size, [], []
    apps = [(Plain if at % jobs else Marked)(server, 'crowd%d' % at, 8600 + at)
            for at in range(number)]
    pushed = Plain(server, 'pushed')
    pushed.release('first')
    try:
        for at in range(0, number, 8):          # sshd lets few begin at once
            together(*[functools.partial(app.release, 'a') for app in apps[at:at + 8]])
        with Crowd(server, apps) as crowd:
            assert crowd.missing(time.time()) == ''
            for turn, (what, kill, typed) in enumerate(KILLS):
                took, missing = kill_again(crowd, times, kill, typed)
                if missing:
                    wrong.append('%s, kill %d: %s%s' % (
                        what, len(took) + 1, missing, crowd.mend()))
                else:
                    said.append('%s: all %d again after %.1f s at the median, '
                                '%.1f s at the longest of %d' % (
                                    what, number, sorted(took)[times // 2],
                                    max(took), times))
                pushed.commit(pushed.files('push%d' % turn))
                outcome = pushed.push()
                if outcome.status:
                    reasons = [line for line in outcome.out
                               if line.startswith('dockhand: ')]
                    wrong.append('%s, then a push: %s%s' % (
                        what, ' / '.join(reasons), crowd.mend()))
    finally:
        for app in apps + [pushed]:
            server.dockhand('destroy', app.name, '--force')
    if wrong:
        raise AssertionError('\n'.join(wrong + said))
    return '\n'.join(said)

@drill('systemd', (6, 1), (30, 10))
def test_real_all_apps_come_back_from_a_kill_of_docker_or_nginx(server, size):
    return come_back_from_kills(server, size, 6)

@drill('upstart', None, (30, 10))
def test_real_all_apps_come_back_from_a_kill_of_docker_or_nginx_under_upstart(
        server, size):
    return come_back_from_kills(server, size, 2)

@drill('systemd', 1, 5)
def test_real_docker_killed_while_it_stops_a_worker_leaves_one_of_them(server, size):
    """In a push that stops one before it starts the other, and in one that hands over."""
    app, generator, said = Worker(server, 'worker'), random.Random(SEED), []

    def strike():
        """Kill docker meanwhile; the moment at which it answers again."""
        server.ok(app.STOPPING, '%.1f' % (generator.random() * 8))
        assert until(lambda: server.run('sh', '-c', ALL_THERE).status, 0) == 0
        return time.time()
    server.ok('dockhand config worker overlap=no')
    app.release('first')
    must(['docker', 'exec', '-d', server.name, 'sh', '-c', app.LOOP])
    try:
        for turn, overlap in enumerate(['no', 'yes'] * size):
            server.ok('systemctl reset-failed docker; dockhand config worker overlap=' +
                      overlap)
            app.follow()
            live, mark, begun = app.mark(), 'turn%d' % turn, time.time()
            app.commit(app.files(mark))
            pushed, back = together(app.push, strike)
            recovered = server.dockhand('recover')  # after the one that follows docker
            assert recovered.status == 0, recovered
            assert until(lambda: server.run('sh', '-c', BACK_AGAIN).status, 0) == 0
            took = time.time() - back
            ran = app.check_whole(live, mark)
            assert pushed.status or ran == mark, pushed
            server.restart_docker()     # which brings back the live one, and no other
            assert until(app.mark, ran) == ran
            time.sleep(3)
            assert app.mark() == ran
            # what is handed over may run twice until then
            both = app.two_at_once(since=back if overlap == 'yes' else begun)
            assert both <= took, (both, took)
            said.append('overlap=%s: push %s, %s runs, both for %.1f s, '
                        'recover took %.1f s' % (
                overlap, 'refused' if pushed.status else 'accepted',
                'the new one' if ran == mark else 'the old one', both, took))
    finally:
        server.ok('rm -f /root/watch; dockhand destroy worker --force')
    return '; '.join(said)

# What is there while nothing happens; not what only the test's own look at it takes.
IDLE = r'''
sleep 1
ps -eo comm= | grep -vE '^(ps|sh|grep|sed|sleep|sshd|\(sd-pam\))$' | sed 's/^/process /'
systemctl list-timers --all --no-legend | grep -oE '[^ ]+\.timer' | sed 's/^/timer /'
ss -Hltun | awk '{ print "socket", $1, $5 }'
'''
MEMORY = ('cat /proc/[0-9]*/smaps_rollup 2>/dev/null | '
          "awk '/^Pss:/ { all += $2 } END { print all }'")

@drill('upstart')                   # whose queue is shorter: it has a server of its own
def test_real_nothing_runs_but_what_docker_runs_for_a_container(server, size):
    """On a fresh server, on which all is there that dockhand needs before dockhand is."""
    fresh = Server('systemd', tempfile.mkdtemp(dir=server.folder))
    fresh.name += '-idle'
    fresh.control('remove')
    fresh.control('boot', 'systemd')

    def look():
        return Counter(fresh.ok(IDLE).splitlines()), int(fresh.ok(MEMORY))

    def more(before):
        """What there is more than before, and less, in words; memory in KB."""
        until(lambda: look()[0] == look()[0], True)
        now = look()
        return now, sorted((now[0] - before[0]).elements()), sorted(
            (before[0] - now[0]).elements()), now[1] - before[1]
    try:
        fresh.ok('mkdir -p /root/dockhand && echo >/root/dockhand/dockhand.py')
        must(['docker', 'cp', HERE + '/configure-system.sh',
              fresh.name + ':/root/dockhand/'])
        fresh.ok('sh /root/dockhand/configure-system.sh' + TINY)
        before = more((Counter(), 0))[0]
        must(['docker', 'cp', HERE + '/dockhand.py', fresh.name + ':/root/dockhand/'])
        fresh.ok('sh /root/dockhand/configure-system.sh')
        for key in ('main', 'main.pub', 'other', 'other.pub'):
            shutil.copy(os.path.join(server.folder, key), fresh.folder)
        now, added, gone, memory = more(before)
        assert not added and set(gone) <= set(['socket tcp [::]:80']), (added, gone)
        said = ['%d processes, %d KB before, %d KB more with dockhand' % (
            sum(before[0].values()), before[1], memory)]
        fresh.connect()
        now = more(before)[0]
        for number in range(2):
            Plain(fresh, 'idle%d' % number).release('a')
            now, added, gone, memory = more(now)
            said.append('an app: %s, %d KB' % (' '.join(added), memory))
            assert [each for each in added if each.startswith('process')] == [
                'process ' + name
                for name in ('containerd-shim', 'docker-init', 'httpd')], added
            assert not gone and len(added) <= 4 - number, (added, gone)
        return '; '.join(said)
    finally:
        fresh.disconnect('main', 'other')
        fresh.control('remove')

# ---- Drills: moving --------------------------------------------------------------------

def export_to(server, path, *names):
    """Export from a server to a file of this machine; what was said."""
    with open(path, 'wb') as target:
        process = subprocess.Popen(
            ['docker', 'exec', server.name, 'dockhand', 'export'] + list(names),
            stdout=target, stderr=subprocess.PIPE)
    said = process.communicate(timeout=180)[1].decode()
    assert process.returncode == 0, said
    return said

def import_from(server, path, *names):
    """Import a file of this machine into a server; (exit status, what was said)."""
    with open(path, 'rb') as source:
        process = subprocess.Popen(
            ['docker', 'exec', '-i', server.name, 'dockhand', 'import'] + list(names),
            stdin=source, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = process.communicate(timeout=300)[0].decode()
    return process.returncode, said

STORED = ('/var/lib/dockhand', '/home/git', '/etc/nginx/conf.d', '/etc/letsencrypt')

def refuse_spoilt(server, path, count):
    """A stream cut at so many places, and with a bit flipped at as many, is refused by a
    server and changes nothing there."""
    places = random.Random(SEED)
    with open(path, 'rb') as source:
        stream = source.read()
    before = server.manifest(*STORED), server.ok('docker ps -aq; docker volume ls -q')
    for turn in range(2 * count):
        at = places.randrange(len(stream))
        spoilt = stream[:at]
        if turn % 2:
            spoilt += bytes([stream[at] ^ 1 << places.randrange(8)]) + stream[at + 1:]
        with open(path + '.spoilt', 'wb') as target:
            target.write(spoilt)
        status, said = import_from(server, path + '.spoilt')
        assert status == 1 and re.match(r'dockhand: [ -~]+\n\Z', said), (at, said)
    after = server.manifest(*STORED), server.ok('docker ps -aq; docker volume ls -q')
    assert after == before

def known_keys(server):
    """{(name, fingerprint, rights)} of a server."""
    return set((key['name'], key['fingerprint'], key['admin'], tuple(key['apps'] or []))
               for key in json.loads(server.ok('dockhand keys --json')))

STARTED = {'Dockerfile': 'FROM tiny:1\nCOPY www /www\nVOLUME /data\nEXPOSE 80\nCMD ["sh", '
                      '"-c", "echo started >>/data/starts; exec httpd -f -h /www"]\n',
        'www/index.html': 'shop one'}
MAKE_PEM = ('openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=x -addext '
            'subjectAltName=DNS:shop.test -keyout /root/key.pem 2>/dev/null | '
            'cat - /root/key.pem')
ASK_TLS = ('curl -sk --resolve shop.test:443:127.0.0.1 https://shop.test/; echo | openssl '
           's_client -connect 127.0.0.1:443 -servername shop.test 2>/dev/null | openssl '
           'x509 -noout -fingerprint')

@drill('none', 20, 200)
def test_real_apps_move_to_another_server_whole(server, size):
    """PostgreSQL under writes, the app that writes to it, and a web app that has data,
    https and config: on a server with another init they answer the same."""
    server.bases()
    for left in json.loads(server.ok('dockhand apps --json')):      # by other drills
        server.ok('dockhand destroy $1 --force --volumes', left['app'])
    data, shop = Database(server, 'data'), Plain(server, 'shop')
    data.begin()
    server.ok('dockhand config shop domains="shop.test" SECRET=- COLOUR=red',
              stdin='of shop\n')
    shop.deploy(STARTED)
    server.ok(MAKE_PEM + ' | dockhand https shop --cert')
    acknowledged = data.check(0)
    path = os.path.join(server.folder, 'stream')

    with fresh_servers('-moved', 'systemd') as (other,):
        other.prepare()
        other.bases()
        said = export_to(server, path)
        downs = re.findall(r'-----> (\w+) was down for ([0-9.]+) s', said)
        assert [name for name, _ in downs] == ['shop', 'writer', 'data'], said
        export_to(server, path + '.shop', 'shop')
        refuse_spoilt(other, path + '.shop', size)

        status, said = import_from(other, path)
        assert status == 0, said
        assert data.check(acknowledged) > acknowledged      # the old one goes on
        there = Database(other, 'data')
        there.writer = App(other, 'writer')
        rows = there.check(0)
        assert rows > acknowledged
        for ask in (ASK_TLS, 'dockhand config shop --values; dockhand config data --values',
                    'git --git-dir=/home/git/shop.git log --format=%H main'):
            assert other.ok(ask) == server.ok(ask)
        assert other.get('shop.test') == '301'              # to https
        assert other.ok('wc -l </var/lib/docker/volumes/shop--data/_data/starts') == '2'
        assert known_keys(other) > known_keys(server)
        assert other.ok('dockhand doctor') == 'all is well'

        status, said = import_from(other, path)
        assert status == 1 and said.count(' is here already') == 3, said
        assert 'nothing has changed' in said
        assert not other.ok('ls /var/lib/dockhand/streams')
    for name in ('writer', 'data', 'shop'):
        server.ok('dockhand destroy $1 --force --volumes', name)
    return '%d kB moved; %s; %d rows acknowledged before, %d there; %d spoilt ones refused' % (
        os.path.getsize(path) // 1000, ', '.join('%s down for %s s' % each for each in downs),
        acknowledged, rows, 2 * size)

@drill('upstart')
def test_real_a_push_and_another_export_meanwhile_wait_their_turn(server, size):
    """The app takes a second to stop, so that each of them comes meanwhile."""
    app = Marked(server, 'kept', 8199)
    path = os.path.join(server.folder, 'stream')

    def files(mark):
        found = app.files(mark)
        job = found['upstart.conf'].replace('--rm', '--rm -v kept--x:/x')
        return dict(found, **{'upstart.conf': job})

    def is_stopping():
        return server.run('test', '-e', '/var/lib/dockhand/apps/kept/exporting').status

    def meanwhile(act, *args):
        assert until(is_stopping, 0, 20, 0.01) == 0
        return act(*args)
    app.deploy(files('a'))
    app.commit(files('b'))
    _, pushed, second = together(
        functools.partial(export_to, server, path + '.1', 'kept'),
        functools.partial(meanwhile, app.push),
        functools.partial(meanwhile, export_to, server, path + '.2', 'kept'))
    assert pushed.status == 0, pushed.err
    waited = [line for line in pushed.out if 'Waiting for an export of kept' in line]
    assert waited, pushed.out
    assert re.search('Waiting for (an export of kept|a push of kept)', second), second
    app.check_whole('b')
    server.ok('dockhand destroy kept --force --volumes')
    for number in '12':
        status, said = import_from(server, path + '.' + number)
        assert status == 0, said
        server.ok('dockhand destroy kept --force --volumes')
    return waited[0]

@drill('upstart')
def test_real_a_shallow_repository_moves_and_takes_the_next_push(server, size):
    app = Plain(server, 'thin')
    for mark in 'abc':
        app.commit(app.files(mark))
    shallow = Plain(server, 'thin')
    shallow.git('fetch', '-q', '--depth', '2', 'file://' + app.folder, 'main')
    shallow.git('reset', '-q', '--hard', 'FETCH_HEAD')
    assert shallow.push().status == 0
    path = os.path.join(server.folder, 'stream')
    export_to(server, path, 'thin')
    server.ok('dockhand destroy thin --force --volumes')
    status, said = import_from(server, path)
    assert status == 0 and shallow.mark() == 'c', said
    shallow.deploy(shallow.files('d'))
    assert shallow.mark() == 'd'
    clone = App(server, 'thin')
    clone.git('fetch', '-q', '--update-shallow', clone.remote, 'main')
    assert clone.git('rev-list', '--count', 'FETCH_HEAD') == '3'
    server.ok('dockhand destroy thin --force --volumes')

def leave_and_come_back(server, app, then):
    """Uninstall, reboot, see the app answer, look at more, install again, and push under
    requests: a gap would be heard of."""
    server.disconnect('main', 'other')
    ask = 'dockhand apps; dockhand releases "$1"; dockhand config "$1" --values'
    before = server.ok(ask, app.name), known_keys(server)
    said = server.ok('dockhand uninstall')
    assert server.run('sh', '-c', 'command -v dockhand || ls /usr/local/lib/dockhand').status
    must(['docker', 'restart', '-t', '60', server.name])
    server.control('up', server.kind)
    server.outside = server.find_ports()
    assert until(app.mark, 'a') == 'a'
    then()
    server.ok('/usr/bin/python3 /root/dockhand/dockhand.py install')
    server.connect()
    assert (server.ok(ask, app.name), known_keys(server)) == before
    with Load(app, **{'tls' if isinstance(app, Secured) else 'new': 2}) as load:
        pushed = app.deploy(app.files('b'))
    assert ', no gap' in pushed.err
    app.check_whole('b')
    return said, load.check()

@drill('systemd')
def test_real_apps_go_on_without_dockhand_and_are_found_again(server, size):
    app, authority = secured(server)
    app.release('a')
    ticking = Ticking(server, 'ticking')
    server.ok('dockhand config ticking overlap=yes')
    ticking.deploy(ticking.files('r0'))
    seen = []

    def without():
        authority.begin()
        seen.append(renew(server, authority, 'secured.test', REGISTERING)[1])
        count = 'cat /var/lib/docker/volumes/ticking--ticks/_data/all 2>/dev/null | wc -l'
        before = server.ok(count)
        assert until(lambda: server.ok(count) != before, True, 90) is True
    said, requests = leave_and_come_back(server, app, without)
    for text in ('removed /usr/local/lib/dockhand', '/etc/cron.d/dockhand-APP',
                 'userdel -r git', '/etc/letsencrypt/renewal-hooks/deploy/dockhand'):
        assert text in said
    server.ok('dockhand destroy ticking --force --volumes')
    return 'without it %s was renewed and a crontab ticked; then %s' % (seen[0], requests)

@drill('upstart')
def test_real_jobs_go_on_without_dockhand_and_are_found_again(server, size):
    app, plain = Marked(server, 'alone', 8198), Plain(server, 'alike')
    app.release('a')
    plain.release('a')
    leave_and_come_back(server, plain, lambda: app.check_whole('a'))
    app.release('b')
    for name in ('alone', 'alike'):
        server.ok('dockhand destroy $1 --force', name)

# ---- Several machines ------------------------------------------------------------------

BROKEN = {'Dockerfile': REAL_WEB + 'EXPOSE 80\nCMD ["false"]\n'}

@drill('systemd', 1, 10)
def test_real_an_app_on_three_machines_is_deployed_without_a_gap(server, size):
    """Twelve clients with new connections, over deploys and rollbacks."""
    with Fleet(1) as fleet:
        front = fleet.front
        app = Plain(front, 'shop')
        app.deploy(app.files('a'))
        asked = 'dockhand config shop machines=3'
        assert 'dockhand machines add root@ADDRESS' in front.run(*asked.split()).err
        for other in fleet.others:
            assert 'runs apps from now on' in fleet.add(other)
        front.ok(asked)
        assert fleet.answers('shop', 'shop.test') == ['shop a'] * 3
        check_private(fleet, 'shop')
        # What once died of it is no reason against going back to it.
        fleet.others[0].ok('docker kill $(docker ps -q)')
        assert until(lambda: fleet.answers('shop', 'shop.test'), ['shop a'] * 3, 60) == (
            ['shop a'] * 3)

        marks = ['r%d' % number for number in range(size)]
        with Load(app, new=12) as load:
            for mark in marks:
                app.deploy(app.files(mark))
            for _ in range(max(1, size // 3)):
                front.ok('dockhand rollback shop')
            check_refusal(attempted(app, BROKEN), 'it does not run: on ')
        figures = load.check()
        assert fleet.answers('shop', 'shop.test') == ['shop ' + app.mark()] * 3
        assert '3 of 3' in front.ok('dockhand apps')
        assert front.ok('dockhand doctor') == 'all is well'
        check_refused_there(front)
        sent = check_what_is_sent(fleet, app)
        check_nothing_is_left(fleet, 'shop')

        check_follows_machines(fleet)
        front.ok('dockhand config shop --unset machines')
        assert app.mark() and not front.ok('docker service ls -q --filter name=shop--99')
        for other in fleet.others:
            front.ok('dockhand machines remove $1', other.name)
            assert other.ok('docker info --format "{{.Swarm.LocalNodeState}}"') == (
                'inactive')
        assert 'no other machine' in front.ok('dockhand machines')
        assert app.mark() and front.ok('docker info --format "{{.Swarm.LocalNodeState}}"'
                                       ) == 'inactive'
        app.deploy(app.files('z'))
        return '%d deploys on three machines; %s; sent of a change of 10 MB: %s' % (
            size, figures, sent)

def check_follows_machines(fleet):
    """An app that is to run on all machines leaves one that goes, and is on one more."""
    front, third = fleet.front, fleet.others[1]
    front.ok('dockhand config shop machines=all')
    front.ok('dockhand machines remove $1', third.name)
    assert 'on 2 of 2 machines' in front.ok('dockhand apps')
    assert third.address + ':' not in front.ok('cat /etc/nginx/conf.d/shop.conf')
    fleet.add(third)
    assert 'on 3 of 3 machines' in front.ok('dockhand apps')
    assert len(set(fleet.answers('shop', 'shop.test'))) == 1

def attempted(app, files):
    """Commit and push; the push's Outcome, whatever it is."""
    app.commit(files)
    return app.push()

def check_private(fleet, app):
    """What the swarm publishes listens on the private address alone."""
    port = json.loads(fleet.front.ok('cat /var/lib/dockhand/apps/$1/live/release.json',
                                     app))['published']
    for server in [fleet.front] + fleet.others:
        listening = server.ok('ss -Hltn "sport = :$1" | awk \'{ print $4 }\'', str(port))
        assert listening == '%s:%d' % (server.address, port)

def check_refused_there(front):
    """What cannot run on several machines is refused, and what was live stays."""
    for name, files, said in (
            ('kept', {'Dockerfile': REAL_WEB + 'VOLUME /data\nEXPOSE 80\n'}, 'VOLUME'),
            ('work', {'Dockerfile': REAL_WEB + 'CMD ["sleep", "9999"]\n'}, 'web apps')):
        files['www/index.html'] = name
        app = App(front, name)
        front.ok('dockhand config $1 machines=2', name)
        check_refusal(attempted(app, files), said)
        front.ok('dockhand destroy $1 --force --volumes', name)

def check_nothing_is_left(fleet, app):
    """Each machine has the images of the kept releases, and no other's."""
    kept = fleet.front.ok('ls /var/lib/dockhand/apps/$1/releases', app).split()
    tagged = 'docker image ls --format "{{.Tag}}" "$1"'
    for other in fleet.others:
        assert set(other.ok(tagged, app).split()) <= set(kept)

@drill('none', 0)
def test_real_a_machine_that_dies_takes_no_request_with_it(server, size):
    with Fleet(2) as fleet:
        front, (second, third) = fleet.front, fleet.others
        for other in fleet.others:
            fleet.add(other)
        app = Plain(front, 'shop')
        front.ok('dockhand config shop machines=all')
        app.deploy(taking_posts(app, 'a'))

        with Load(app, new=6, post=6) as load:
            fleet.power(third, 'kill')
            begun = time.time()
            assert until(lambda: fleet.machines()[third.name]['state'], 'down', 40) == (
                'down')
            heard = time.time() - begun
            pushed = app.deploy(taking_posts(app, 'b'))
        figures = load.check(posts=6)
        assert '%s is down' % third.name in pushed.err
        assert '2 of 3' in front.ok('dockhand apps')

        begun = time.time()
        fleet.power(third, 'start')
        third.control('up', 'systemd')
        booted = time.time() - begun
        is_up = 'docker node ls --filter name=$1 --format "{{.Status}}"'
        assert until(lambda: front.ok(is_up, third.name), 'Ready', 60) == 'Ready'
        time.sleep(3)                   # it lacks the image: nothing is tried there
        assert fleet.answers('shop', 'shop.test') == ['shop b', 'shop b', 'nothing']
        assert not third.ok('docker ps -aq --filter name=shop--2')
        asked = time.time()
        fleet.machines()
        assert until(lambda: fleet.answers('shop', 'shop.test'), ['shop b'] * 3, 30) == (
            ['shop b'] * 3)
        served = time.time() - asked

        said = push_past_trouble(app, fleet)
        moved = one_machine_alone(app, fleet)
        return 'down after %.1f s; booted in %.1f, serving %.1f s after machines; %s; %s; '\
               'one alone moved in %.1f s' % (heard, booted, served, figures, said, moved)

def taking_posts(app, mark):
    """The files of an app that answers a POST too."""
    return app.files(mark, 'RUN chmod 755 /www/cgi-bin/post\n' + app.COMMAND, **{
        'www/cgi-bin/post': '#!/bin/sh\necho; cat /www/index.html\n'})

FULL_THERE = 'mount -t tmpfs -o size=4k tmpfs /var/lib/docker/tmp'
CLOSED_THERE = 'mv /root/.ssh/authorized_keys /root/closed'

def push_past_trouble(app, fleet):
    """A full disk, or a closed ssh, on one machine is said, and the push goes on; on all
    of them it is refused, and nothing changes. What was said."""
    second, third = fleet.others
    said = []
    for number, (break_it, mend_it, words) in enumerate((
            (FULL_THERE, 'umount /var/lib/docker/tmp', 'no space left on device'),
            (CLOSED_THERE, 'mv /root/closed /root/.ssh/authorized_keys', 'Permission'))):
        third.ok(break_it)
        pushed = app.deploy(app.files('t%d' % number))
        told = [line for line in pushed.out if 'On 2 of 3 machines' in line]
        assert len(told) == 1 and words in told[0] and third.name in told[0], pushed.err
        said += told
        second.ok(break_it)
        live = app.mark(), fleet.front.ok('dockhand releases shop | grep live')
        check_refusal(attempted(app, app.files('u%d' % number)),
                      'no other machine took its image: .*' + words)
        assert (app.mark(), fleet.front.ok('dockhand releases shop | grep live')) == live
        for other in fleet.others:
            other.ok(mend_it)
        app.deploy(app.files('v%d' % number))
        assert fleet.answers('shop', 'shop.test') == ['shop v%d' % number] * 3
    return ' | '.join(said)

def one_machine_alone(app, fleet):
    """An app that runs on one machine is on another one within a minute, if that dies;
    the seconds."""
    fleet.front.ok('dockhand config shop machines=1')
    answers = fleet.answers('shop', 'shop.test')
    at = [number for number, answer in enumerate(answers) if answer != 'nothing']
    assert len(at) == 1, answers
    if at == [0]:                       # the front itself: have the swarm choose another
        node = 'docker node update --availability %s $(hostname)'
        fleet.front.ok(node % 'drain')
        until(lambda: fleet.answers('shop', 'shop.test')[0], 'nothing', 30)
        assert until(lambda: bool(app.mark()), True, 60)
        fleet.front.ok(node % 'active')
        answers = fleet.answers('shop', 'shop.test')
        at = [number for number, answer in enumerate(answers) if answer != 'nothing']
    dying = fleet.others[at[0] - 1]
    fleet.power(dying, 'kill')
    begun = time.time()
    assert until(lambda: bool(app.mark()), True, 60)
    seconds = time.time() - begun
    fleet.power(dying, 'start')
    return seconds

TALKING = {'Dockerfile': 'FROM tiny:1\nVOLUME /data\nEXPOSE 5432\n'
                         'CMD ["nc", "-ll", "-p", "5432", "-e", "echo", "of db"]\n'}
ASKING = {'www/cgi-bin/ask': '#!/bin/sh\necho; echo $(nc -w 3 db 5432 </dev/null)\n'}

@drill('upstart', None, 12)
def test_real_the_front_of_machines_loses_power_in_the_midst_of_pushes(server, size):
    places = random.Random(SEED)
    with Fleet(3) as fleet:
        front = fleet.front
        for other in fleet.others:
            fleet.add(other)
        database, app = App(front, 'db'), Plain(front, 'shop')
        database.deploy(TALKING)
        front.ok('dockhand config shop machines=all')
        web = app.files('a')
        web['Dockerfile'] = web['Dockerfile'].replace(
            'EXPOSE', 'RUN chmod 755 /www/cgi-bin/ask\nEXPOSE')
        app.deploy(dict(web, **ASKING))
        check_reaches_database(fleet)

        live, through = 'a', 0
        with Asking(fleet, 'shop') as asking:
            for turn in range(size):
                mark = 'p%d' % turn
                app.commit({'www/index.html': 'shop ' + mark})
                process, _ = app.hear('Building')
                time.sleep(places.random() * 9)
                front.cut_power()
                process.communicate()
                assert until(lambda: app.mark() in (live, mark), True, 90), app.mark()
                through += app.mark() == mark
                live = app.mark()
                asking.turn_to('shop')
                assert until(lambda: fleet.answers('shop', 'shop.test'),
                             ['shop ' + live] * 3, 60) == ['shop ' + live] * 3
                front.ok('! ls /var/lib/dockhand/apps/shop/pending 2>/dev/null')
                running = front.ok('docker service ls --format "{{.Name}} {{.Replicas}}"')
                assert running.count(' 0/0') == running.count('\n'), running
        front.reboot()
        until(lambda: fleet.answers('shop', 'shop.test'), ['shop ' + live] * 3, 60)
        named = check_reaches_database(fleet)
        pushed = app.deploy({'www/index.html': 'shop z'})
        assert app.mark() == 'z', pushed.err
        return '%d of %d pushes live all the same; %s; names %.1f s after a reboot' % (
            through, size, asking.figures(), named)

@drill('systemd', None, 50)
def test_real_killed_pushes_to_machines_leave_one_whole_release(server, size):
    with Fleet(4) as fleet:
        front = fleet.front
        for other in fleet.others:
            fleet.add(other)
        app = Plain(front, 'shop')
        front.ok('dockhand config shop machines=all')
        app.release('a')
        begun = time.time()
        app.release('b')
        seconds = time.time() - begun

        def killed(moment):
            front.ok(KILLER, str(moment))

        def recover():
            front.ok('dockhand recover')
            answers = fleet.answers('shop', 'shop.test')
            assert answers == ['shop ' + app.mark()] * 3
        with Watch(front, app) as watch:
            said = interrupt(app, size, seconds, killed, recover)
        assert watch.heard['shop'].count('') == 0
        check_nothing_is_left(fleet, 'shop')
        return '%s; %s' % (said, watch.figures())

def check_reaches_database(fleet):
    """From every machine the app reaches what stays on the front by its name; after how
    many seconds. (After a boot docker's machines find one another again in their time.)"""
    begun = time.time()
    record = json.loads(fleet.front.ok('cat /var/lib/dockhand/apps/shop/live/release.json'))
    for server in [fleet.front] + fleet.others:
        ask = 'curl -s -m 9 http://$1:$2/cgi-bin/ask'
        assert until(lambda: fleet.front.run(
            'sh', '-c', ask, 'sh', server.address, str(record['published'])).out.strip(),
            'of db', 90) == 'of db', server.name
    return time.time() - begun

class Asking(object):
    """Requests on each machine but the front to the port of what is live there, inside a
    `with`: whatever becomes of the front, none of these fails."""
    LOOP = ('touch /root/asking; while [ -e /root/asking ]; do read url </root/url; '
            'curl -s -o /dev/null -m 9 $url && echo yes || echo no $url; sleep 0.05; '
            'done >>/root/heard')

    def __init__(self, fleet, app):
        self.fleet = fleet
        self.turn_to(app)

    def turn_to(self, app):
        record = json.loads(self.fleet.front.ok(
            'cat /var/lib/dockhand/apps/$1/live/release.json', app))
        for server in self.fleet.others:
            server.ok('echo $1 >/root/url.new; mv /root/url.new /root/url',
                      'http://%s:%d/' % (server.address, record['published']))

    def __enter__(self):
        for server in self.fleet.others:
            must(['docker', 'exec', '-d', server.name, 'sh', '-c', self.LOOP])
        return self

    def __exit__(self, *error):
        for server in self.fleet.others:
            server.ok('rm -f /root/asking')

    def figures(self):
        heard = [line for server in self.fleet.others
                 for line in server.ok('cat /root/heard').splitlines()]
        failed = [line for line in heard if line != 'yes']
        return 'the machines answered %d times, %d times not: %s' % (
            heard.count('yes'), len(failed), ' '.join(sorted(set(failed))))

BULKY = ('FROM tiny:1\nRUN head -c 90000000 /dev/urandom >/bulk\nCOPY part /part\n'
         'COPY www /www\nEXPOSE 80\nCMD ["httpd", "-f", "-h", "/www"]\n')

def check_what_is_sent(fleet, app):
    """Of a hundred MB the ten that have changed; what was sent, in MB."""
    for mark in 'xy':
        part = os.urandom(10 ** 7)
        pushed = app.deploy({'Dockerfile': BULKY, 'part': part,
                             'www/index.html': 'shop ' + mark})
        sent = [float(each) for each in re.findall(r'([0-9.]+) MB to ', pushed.err)]
        assert len(sent) == 2, pushed.err
    assert max(sent) < 12, pushed.err
    image = 'docker inspect --format "{{.Id}}" shop:$1'
    number = fleet.front.ok('basename $(readlink /var/lib/dockhand/apps/shop/live)')
    assert len(set(server.ok(image, number)
                   for server in [fleet.front] + fleet.others)) == 1
    for other in fleet.others:
        assert other.ok('journalctl -u docker | grep -ci registry || :') == '0'
    return sent
