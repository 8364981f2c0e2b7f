"""The tests of dockhand, in three layers.

Tables over the functions that decide; a Host in a temporary folder, where a command that
nobody expects fails the test; and, from "The real layer" on, dockhand on fresh servers.
"""
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import pickle
import pwd
import random
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import namedtuple
from contextlib import contextmanager

import pytest

import dockhand as dh
from dockhand import Failure, Host, Key, Published, Result

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

@pytest.fixture(autouse=True)
def signals_stay():
    """Undoing ignores signals for the rest of a process; here for the rest of a test."""
    kept = [(number, signal.getsignal(number))
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    yield
    for number, handler in kept:
        signal.signal(number, handler)

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
    assert dh.parse_ssh_command(command) == (verb, app)

@table('command', r'''
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
    \e]0;x''', 'x' * 10240)
def test_any_other_ssh_command_is_refused(command):
    assert 'it can git push, fetch and clone' in refusal(dh.parse_ssh_command, command)

@each('path', r'''../../tmp/x .. / //blog ~/blog a/b .ssh/authorized_keys -a blog.git.git
      blog.git/ a\nb $(id) --upload-pack=x''', '')
def test_a_repository_path_that_is_no_name_is_refused(path):
    command = "git-receive-pack '%s'" % path
    assert 'is no name for an app' in refusal(dh.parse_ssh_command, command)

def test_no_ssh_command_is_answered_with_what_to_type():
    assert 'git push git@HOST:APP.git main' in refusal(dh.parse_ssh_command, '')

SHA, SHA_2, SHA_3, ZERO = '1' * 40, '2' * 40, '3' * 40, '0' * 40

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
    # a comment\n                               => no key among these lines
    -----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n => this is a private key
    -----BEGIN RSA PRIVATE KEY-----\n           => this is a private key
    ---- BEGIN SSH2 PUBLIC KEY ----\n           => is no public key
    garbage and more                            => is no public key
    ssh-ed25519                                 => is no public key
    {ED}                                        => is no public key
    {LINE}\ngarbage                             => "garbage" is no public key
    command="/bin/sh" {LINE}                    => is no public key
    no-pty {LINE}                               => is no public key
    ssh-rsa {ED} a                              => is no public key
    ssh-ed25519 x{ED} a                         => is no public key
    ssh-ed25519 {ED}"x a                        => is no public key
    ssh-ed25519 {ED}==== a                      => is no public key
    SSH-ED25519 {ED}                            => is no public key
    \e[2J \0                                    => "?[2J ?" is no public key
    '''.rstrip().replace('{ED}', ED).replace('{LINE}', LINE),
    ('x' * 10 ** 6, 'xxx..." is no'), (dh.to_text(b'\xff\xfe\x00 \x80'), 'is no public'))
def test_what_is_no_list_of_public_keys_is_refused_whole(text, said):
    assert said in refusal(dh.parse_public_keys, text)

def test_a_fingerprint_is_what_openssh_prints():
    assert dh.fingerprint(ED) == 'SHA256:IcBTyoCUO8IOhUcfcAcw9+qYYPF/HUxWZTfrHYzhWn4'

OPTIONS = 'no-port-forwarding,no-X11-forwarding,no-agent-forwarding,no-pty,no-user-rc'
KEYS_TEXT = '''ssh-rsa AAAA admin's own
# dockhand: keys from here to the next mark; see `dockhand keys`
command="/usr/local/bin/dockhand serve anna",%s ssh-ed25519 %s anna
command="/usr/local/bin/dockhand serve bob blog wiki",%s ssh-ed25519 %s bob
# dockhand: end of keys
ssh-rsa BBBB another
''' % (OPTIONS, ED, OPTIONS, ED_2)
KEYS = [Key(*ONE + ('anna', ())), Key(*TWO + ('bob', ('blog', 'wiki')))]

def test_authorized_keys_are_written_between_two_marks_and_read_again():
    parts = (["ssh-rsa AAAA admin's own"], KEYS, ['ssh-rsa BBBB another'])
    assert dh.render_authorized_keys(*parts) == KEYS_TEXT
    assert dh.split_authorized_keys(KEYS_TEXT) == parts

@pytest.mark.parametrize('text', [
    'ssh-rsa AAAA me\n\n# x\n', dh.to_text(b'# a\xe2\x80\xa8b\n'), '# a\x0cb\r\n'])
def test_lines_outside_the_marks_are_left_alone(text):
    before, keys, after = dh.split_authorized_keys(text)
    assert dh.render_authorized_keys(before, keys, after).startswith(text)
    cut = KEYS_TEXT.replace('# dockhand: end of keys\n', '') + text
    assert dh.split_authorized_keys(cut)[1:] == (
        KEYS, ['ssh-rsa BBBB another'] + text[:-1].split('\n'))

def test_a_key_is_added_once():
    once = dh.add_keys([], [ONE, ONE, TWO], 'anna', ())
    assert once == [Key(*ONE + ('anna', ())), Key(*TWO + ('anna', ()))]
    assert dh.add_keys(once, [TWO], 'anna', ()) == once

def test_a_key_that_has_another_name_is_refused_with_that_name():
    assert 'known as "anna": dockhand remove-key anna' in refusal(
        dh.add_keys, KEYS, [ONE], 'carl', ())

def test_new_rights_are_those_of_every_key_of_the_name():
    keys = dh.add_keys(KEYS, [THREE], 'bob', ('blog',))
    assert [(key.name, key.apps) for key in keys] == [
        ('anna', ()), ('bob', ('blog',)), ('bob', ('blog',))]

def test_rights_longer_than_sshd_reads_are_refused():
    key = Key('ssh-rsa', RSA, 'anna', ('a' * 40,) * 200)
    assert 'too many apps' in refusal(dh.render_authorized_keys, [], [key], [])

def test_a_file_copied_from_the_server_gets_no_second_header():
    text = dh.headed('blog', 'job', 'exec x\n')
    assert re.match("# dockhand: blog's job, .*\nexec x\n\\Z", text)
    assert dh.headed('blog', 'job', text) == text

# ---- Jobs ------------------------------------------------------------------------------

def parsed(text):
    return [(stanza.name, stanza.text.strip()) for stanza in dh.parse_job(text)]

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
    assert parsed((name + ' ' + value).strip() + end) == [(name, value)]

@each('kind', r'pre-start\_ post-start\_ pre-stop\_ post-stop\_', '')
@table('text, value', r'''
    {0}script\n  a\n  # end script?\n  b\nend script\n     => a\n  # end script?\n  b
    \_{0}script \r\n a\r\n end\tscript                     => a
    # x\n\n{0}script\necho end script\nend script\nexec a  => echo end script
    {0}script\nend script                                  =>
    {0}script # x\na\nend script # y\n{0}script\nb\nend script => a''')
def test_a_script_goes_to_its_end(text, value, kind):
    assert parsed(text.format(kind))[0] == (kind + 'script', value)

@table('text, values', r'''
    exec a \\\n  b\nrespawn                 => a \\\n  b|
    start on (a\n  and b)\nexec c           => (a\n  and b)|c
    start on (a and (b\n or c))\n           => (a and (b\n or c))
    # exec a\n\t \n  exec b # it's\nrespawn => b # it's|
    exec a\r\n\r\nexec b                    => a|b''')
def test_continued_lines_and_comments_are_read(text, values):
    assert '|'.join(value for _, value in parsed(text)) == values

def test_a_stanza_knows_its_line():
    text = '# \n\nexec x \\\n y\nscript\na\nend script\nrespawn'
    assert [stanza.line for stanza in dh.parse_job(text)] == [3, 6, 8]

@table('text, said', r'''
    nonsense\n               => 1: unknown stanza `nonsense`
    \nExec a\n               => 2: unknown stanza `Exec`
    exec a\nexecute b        => 2: unknown stanza `execute`
    respawn\npre-begin exec x => 2: unknown stanza `pre-begin exec`
    kill\n                   => 1: unknown stanza `kill`
    kill hard x              => 1: unknown stanza `kill hard`
    start with x\n           => 1: unknown stanza `start with`
    \n\nscript\n a\n         => 3: `script` without `end script`
    script\n a\nend scripts  => 1: `script` without `end script`
    pre-start script\n a     => 1: `script` without `end script`
    script                   => 1: `script` without `end script`
    end script               => 1:
    \e[2J\n                  => 1: unknown stanza `?[2J`
    a\0b                     => 1: unknown stanza `a?b`
    exec docker run b "x\n   => 1: a quote is not closed
    respawn\nauthor don't    => 2: a quote is not closed''')
def test_a_job_that_init_would_not_read_is_refused_by_line(text, said):
    assert refusal(dh.parse_job, text).startswith('upstart.conf:' + said)

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
NOTE = ('note: under Upstart this does not come back when docker is restarted; '
        '`start on started docker` and `stop on stopping docker` does')
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

@table('value, first, second, third, fourth', '''
    80                => => => 80 => tcp
    8000:80           => => 8000 => 80 => tcp
    127.0.0.1:8000:80 => 127.0.0.1 => 8000 => 80 => tcp
    127.0.0.1::80     => 127.0.0.1 => => 80 => tcp
    53:53/udp         => => 53 => 53 => udp
    [::1]:80:80/tcp   => [::1] => 80 => 80 => tcp''')
def test_a_published_port_is_read(value, first, second, third, fourth):
    job = dh.parse_job('exec docker run --rm -p%s blog' % value)
    assert dh.published_ports(job) == [Published(first, second, third, fourth)]

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
    env A=-P\nexec docker run --rm $A blog              => --publish-all''')
def test_a_job_is_read_as_the_shell_and_docker_would(text, options):
    assert contained(text).options == options.split() and contained(text).image == 'blog'

@table('text, said', r'''
    exec /opt/daemon                                        => 1: `exec` cannot be had
    exec sleep 9                                            => 1: `exec` cannot
    chroot /x\nexec docker run --rm blog                    => 1: `chroot` cannot
    normal exit 0\nexec docker run --rm blog                => 1: `normal exit` cannot
    exec docker run --rm blog\npre-start exec mkdir /x      => 2: `mkdir` cannot
    post-stop script\n :\n rm x\nend script\nexec docker run b => 3: `rm` cannot
    pre-start exec echo x | docker rm y\nexec docker run b  => 1: `echo` cannot
    exec docker run --rm blog | logger                      => 1: `|` cannot
    exec docker run --rm blog & wait                        => 1: `&` cannot
    exec docker run --rm blog >> /var/log/x                 => 1: `>>` cannot
    exec docker run --rm blog 2>&1                          => 1: `>&` cannot
    script\ndocker run a\ndocker run b\nend script          => 2: `script` cannot
    exec docker run --rm -e A=$(hostname) b                 => 1: `A=$(hostname)` cannot
    exec docker run --rm -e A=`hostname` b                  => 1: `A=`hostname`` cannot
    exec docker run --rm \\\n -e A=$HOME b                  => 2: `A=$HOME` cannot
    env A=1\nexec docker run --rm b $A $AB                  => 2: `$AB` cannot
    env A=1\nexec docker run --rm b ${A:-2}                 => 2: `${A:-2}` cannot''')
def test_what_has_no_equivalent_in_docker_is_refused_by_line(text, said):
    assert refusal(contained, text).startswith('upstart.conf:' + said)

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
    assert [(server.line, server.names) for server in dh.servers_of(PROXY)] == [
        (4, ['blog.example.org', 'www.example.org', '.example.net']), (11, []), (13, [])]
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
    others = {'/etc/nginx/conf.d/w.conf': dh.servers_of(other)}
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

CATCH_ALL = '''# dockhand: what no app answers to; written anew when the apps change
server {
    listen 80%s;%s
    server_name _;
    return 404;
}
'''
REJECT = '''server {
    listen 443 ssl;%s
    server_name _;
    ssl_reject_handshake on;
}
'''
PLAIN_ALL, OLD_ALL = CATCH_ALL % ('', ''), CATCH_ALL % (' default_server', '')
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
    ('{a 443 ssl}', (1, 19, 3), False, PLAIN_ALL),
    ('{a 443 ssl, [::]:443 ssl, [::]:80}', (1, 24, 0), True,
     CATCH_ALL % ('', V6 % '') + REJECT % '\n    listen [::]:443 ssl;')])
def test_the_catch_all_listens_where_the_apps_do(text, version, ipv6, expected):
    servers = dh.servers_of(blocks(text))
    found = [listen for server in servers for listen in server.listens]
    assert dh.render_catch_all(found, version, ipv6) == expected

NGINX_CONF = '''user www-data;
pid /run/nginx.pid;
events { worker_connections 768; }
http {
    include /etc/nginx/mime.types;
    %s
    include /etc/nginx/sites-enabled/*;
}
'''

@table('line', r'''
    include /etc/nginx/conf.d/*.conf;
    include conf.d/*.conf ;
    include\tconf.d/*;''')
def test_a_candidate_is_staged_in_a_copy_of_nginx_conf(line):
    files = ['/a.conf', '/b\\1.conf']
    assert dh.stage_nginx_conf(NGINX_CONF % line, files, '/x.pid') == '''\
pid /x.pid;
user www-data;

events { worker_connections 768; }
http {
    include /etc/nginx/mime.types;
    include /a.conf;
include /b\\1.conf;
    include /etc/nginx/sites-enabled/*;
}
'''

def test_a_configuration_that_does_not_include_conf_d_is_refused():
    said = refusal(dh.stage_nginx_conf, NGINX_CONF % '', [], '/x')
    assert 'add it to its http block' in said

@table('text, address', r'''
    {Blog.org 80}         => http://blog.org/
    {a 443 ssl}           => https://a/
    {a 8081}              => http://a:8081/
    {_ 80 default_server} => http://{HOST}/
    {*.a}\n{b}            => http://b/
    {~^w+$}               => None
    {a unix:/x}           => None
    {_}                   => None'''.replace('{HOST}', os.uname()[1]))
def test_the_address_is_what_a_person_would_type(text, address):
    assert str(dh.proxy_address(dh.servers_of(blocks(text)))) == address

@table('err, said', r'''
    n: [emerg] unknown x in /etc/nginx/.c:3\nn: failed => nginx-proxy.conf:2: unknown x
    n: [warn] a\nn: [emerg] no "x" in /etc/nginx/.c:9      => nginx-proxy.conf:8: no "x"
    n: [emerg] a duplicate in /etc/nginx/w.conf:2 => a duplicate in /etc/nginx/w.conf:2
    2024/01/01 00:00:00 [emerg] 12#12: bind() failed       => bind() failed
    strange                                                => strange
    => nginx -t failed''')
def test_the_words_of_nginx_become_a_line_of_the_pushed_file(err, said):
    assert dh.nginx_error(err, '/etc/nginx/.c') == said


# ---------------------------------------------------------------------------------------
# Command lines, and what programs say
# ---------------------------------------------------------------------------------------

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
    for _, function, pattern in dh.COMMANDS:
        code = function.__code__
        options = re.findall(r'\[--?([a-z]+)', pattern)
        words = re.sub(r'\[-.*?\]|\[.*\.\.\.\]', '', pattern)
        words = words.replace('[N]', 'number').strip('[]').lower().split()
        assert sorted(code.co_varnames[1:code.co_argcount]) == sorted(words + options)
        assert function.__doc__ and bool(code.co_flags & 4) == ('...' in pattern)

def test_unknown_commands_are_usage_errors_and_none_lists_all(capfd):
    host = Host('/nowhere', run=None)
    for words in (['nonsense'], ['\x1b[2J'], ['install', 'x'], ['logs']):
        with pytest.raises(dh.Usage):
            dh.run_command(host, words)
    for words in ([], ['help'], ['--help']):
        dh.run_command(host, words)
        out = capfd.readouterr().out
        assert all('dockhand %s ' % name in out for name, _, _ in dh.COMMANDS)

def test_what_a_stranger_sent_is_printed_as_plain_ascii():
    assert dh.printable('a b\x1b[31m\n\r\0') == 'a b?[31m???'
    assert dh.printable('x' * 90) == 'x' * 80 + '...'

@table('given, said', r'''
    \e[1;31mred\e[0m\_ => red
    a\tb               => a\tb
    \0a\r              => a
    \e]0;title\e\\     => ]0;title\\
    \e[?25lx\e[K       => x''')
def test_a_line_of_output_loses_its_control_characters(given, said):
    assert dh.plain_line(given) == said

@table('out, version', r'''
    Client:\n Version: 29.0\nServer: Docker\n Engine:\n  Version: 28.1.0 => 28.1.0
    Client:\n Version: 1.9\n\nServer:\n Version:      1.10.3\n           => 1.10.3
    Client version: 0.7.1\nServer version: 0.7.6\n                       => 0.7.6''')
def test_the_version_of_the_engine_counts_not_the_clients(out, version):
    found = dh.docker_version(Host('/', lambda argv: Result(0, out, '')))
    assert '.'.join(str(part) for part in found) == version

def test_a_docker_that_does_not_answer_is_said_with_its_words():
    result = Result(1, 'Client:\n Version: 28.1\n', 'Cannot connect.\n')
    host = Host('/', lambda argv: result)
    assert refusal(dh.docker_version, host) == 'docker does not answer: Cannot connect.'
    result = Result(1, '[]', 'failed to connect to the docker API at unix:///x\n')
    assert refusal(dh.inspect, Host('/', lambda argv: result), 'a').endswith('unix:///x')
    result = Result(1, '[]\n', 'error: no such object: a\n')
    assert dh.inspect(Host('/', lambda argv: result), 'a') == []

def test_a_tag_is_moved_by_docker_before_1_10_too():
    done = []

    def run(argv):
        done.append(' '.join(argv))
        return Result('-f' not in argv, '', 'Conflict: Tag latest is already set to x\n')
    dh.tag_image(Host('/', run), 'a:1', 'a:latest')
    assert done == ['docker tag a:1 a:latest', 'docker tag -f a:1 a:latest']

@table('heard, status, said', '''
    x                                        => 1   => nothing has changed; mend
    exit code 1370                           => 1   => nothing has changed; mend
    x                                        => 137 => out of memory (137)
    The command returned a non-zero code: 137 => 1  => out of memory
    did not complete: exit code: 137         => 1   => out of memory
    exec /bin/sh: exec format error          => 1   => exec format error''')
def test_the_known_reasons_of_a_failed_build_are_named(heard, status, said):
    assert dh.build_trouble(heard, int(status)).startswith(said)

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

# ---- The little OS layer ---------------------------------------------------------------

USER, GROUP = os.getuid() or 12345, os.getgid() or 12345
OWN = dh.Account('git', USER, GROUP, '/home/git', '/bin/sh')

def mode_of(path):
    return '%o' % stat.S_IMODE(os.lstat(str(path)).st_mode)

def owner_of(path):
    found = os.lstat(str(path))
    return found.st_uid, found.st_gid

def test_a_file_is_replaced_whole_and_only_when_it_differs(tmpdir):
    path = str(tmpdir.join('x.conf'))
    assert dh.replace_file(path, 'one', 0o640, OWN) is True
    assert (mode_of(path), owner_of(path)) == ('640', (USER, GROUP))
    first = os.stat(path).st_ino
    assert dh.replace_file(path, 'one', 0o640, OWN) is False
    assert os.stat(path).st_ino == first
    assert dh.replace_file(path, 'one', 0o600, OWN) is True and mode_of(path) == '600'
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
    assert refusal(dh.replace_file, path, 'two', 0o440, None, check) == 'no'
    assert seen == [('two', 'one', '440')]
    assert dh.read_file(path) == 'one' and os.listdir(str(tmpdir)) == ['x.conf']

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
    assert order == ['first', 'second'] and dh.read_file(path) == ''

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

def test_a_path_stays_under_the_root(tmpdir):
    host = Host(str(tmpdir))
    assert host.path('/etc/x') == host.path('etc', '/x') == str(tmpdir.join('etc/x'))


# ---------------------------------------------------------------------------------------
# A machine in a folder
# ---------------------------------------------------------------------------------------

QUERIES = ('docker inspect', 'docker ps', 'docker version', 'docker logs', 'nginx -v',
           'initctl version', 'status', 'git', 'which', 'tail', 'ssh-keygen')

MAIN = 'refs/heads/main'

class Machine(object):
    """What docker, nginx, git and init do, in small, on files under a root of its own.

    A method is a command: named for its first two words, or the first. A command without
    one fails the test.
    done    the commands that change something, without the root
    broken  {beginning of a command: how often it fails}
    """
    def __init__(self, root, init='none'):
        self.root, self.init, self.host = str(root), init, Host(str(root), self)
        self.done, self.broken, self.count = [], {}, 100
        self.images, self.containers, self.jobs = {}, {}, {}
        self.commits, self.refs, self.served, self.state = {}, {}, None, 'running'
        self.write('/etc/passwd', 'git:x:%d:%d::/home/git:/bin/sh\n' % (USER, GROUP))
        self.write('/etc/nginx/nginx.conf', NGINX_CONF % 'include conf.d/*.conf;')
        folders = '''/proc /etc/nginx/conf.d /home/git /var/lib/dockhand/build /run /var/lib/docker
            /usr/local/bin /etc/sudoers.d /etc/init'''.split() + {
                'systemd': ['/run/systemd/system', '/etc/systemd/system'],
                'upstart': ['/sbin/initctl'], 'none': []}[init]
        for folder in folders:
            dh.make_folder(self.host.path(folder))

    def write(self, path, text):
        dh.make_folder(os.path.dirname(self.host.path(path)))
        dh.replace_file(self.host.path(path), text)

    def read(self, path):
        return dh.read_file(self.host.path(path))

    def __call__(self, argv, account=None, each=None, **options):
        line = ' '.join(argv).replace(self.root, '')
        if not line.startswith(QUERIES):
            self.done.append(line)
        for beginning in self.broken:
            if line.startswith(beginning) and self.broken[beginning]:
                self.broken[beginning] -= 1
                return Result(1, '', 'broken on purpose\n')
        names = [re.sub(r'\W+', '_', ' '.join(argv[:count])) for count in (2, 1)]
        method = getattr(self, names[0], None) or getattr(self, names[1], None)
        assert method, 'unexpected command: ' + line
        self.each = each
        result = method(*argv[1:])
        return result if isinstance(result, Result) else Result(0, result or '', '')

    def next(self):
        self.count += 1
        return self.count

    # docker

    def docker_version(self, _):
        return 'Client:\n Version: 29.0.0\nServer:\n Engine:\n  Version: 28.1.0\n'

    def docker_inspect(self, _, *names):
        found = [each for each in [self.find(name) for name in names] if each]
        return Result(len(found) < len(names), json.dumps(found), 'No such object\n')

    def find(self, name):
        """An image by tag or id, or a container by name or id."""
        things = list(self.images.items()) + list(self.containers.items())
        found = [thing for key, thing in things if name in (key, thing['Id'])]
        return found[0] if found else None

    def docker_build(self, *words):
        folder, tag = words[-1], words[words.index('-t') + 1]
        text = dh.read_file(os.path.join(folder, 'Dockerfile'))
        record = '/var/lib/dockhand/apps/blog/releases/%s/release.json' % tag[5:]
        assert tag == 'blog:plan' or '"seconds": null' in self.read(record)
        self.each('Step 1/1 : ' + text)
        self.images[tag] = image(text)
        if 'fail' in text:
            del self.images[tag]
            return Result(1, '', '')

    def docker_tag(self, _, source, target):
        self.images[target] = self.find(source)

    def docker_rmi(self, *words):
        if not self.images.pop(words[-1], None):
            return Result(1, '', 'Error response from daemon: No such image: x\n')

    def docker_create(self, *words):
        if words[2] in self.containers:
            return Result(1, '', 'Conflict. The name "/x" is already in use by y.\n')
        found = [self.find(word) for word in words if self.find(word)]
        self.containers[words[2]] = self.container('c%d' % self.next(), found[0]['Id'])

    def container(self, name, image):
        return {'Id': name, 'Image': image, 'RestartCount': 0, 'policy': 'no',
                'NetworkSettings': {},
                'State': {'Running': False, 'StartedAt': '', 'ExitCode': 0}}

    def docker_start(self, _, name):
        if name not in self.containers:
            return Result(1, '', 'Error response from daemon: No such container: x\n')
        found = self.containers[name]
        found['State'] = {'Running': 'dies' not in found['Image'], 'ExitCode': 1,
                          'StartedAt': str(self.next())}

    def docker_stop(self, _, t, seconds, name):
        assert t == '-t' and seconds.isdigit()
        if not self.find(name):
            return Result(1, '', 'Error response from daemon: No such container: x\n')
        self.find(name)['State'].update(Running=False)

    def docker_update(self, _, option, policy, name):
        assert option == '--restart'
        if name not in self.containers:
            return Result(1, '', 'Error response from daemon: No such container: x\n')
        self.containers[name]['policy'] = policy

    def docker_rm(self, _, f, v, name):
        assert (f, v) == ('-f', '-v')
        if name not in self.containers:
            return Result(1, '', 'Error response from daemon: No such container: x\n')
        del self.containers[name]

    def docker_diff(self, _, name):
        return 'C /srv\nA /srv/kept.db\nC /run\nA /run/x.pid\n'

    def docker_ps(self, _, q, no_trunc):
        assert q in ('-q', '-aq') and no_trunc == '--no-trunc'
        return '\n'.join(each['Id'] for each in self.containers.values()
                         if q == '-aq' or each['State']['Running'])

    def docker_logs(self, *words):
        self.each('its last words')

    tail = docker_logs

    # init

    def initctl(self, verb):
        return 'init (upstart 1.5)\n'

    def timeout(self, seconds, command, *words):
        return getattr(self, command)(*words)

    def ip(self, *route):
        return '192.0.2.1 via 192.0.2.9 dev eth0 src 192.0.2.2 uid 0\n    cache\n'

    def hostname(self, all_addresses):
        return '192.0.2.1 192.0.2.2 \n'

    def getent(self, ahosts, name):
        return {'here.org': '192.0.2.2  STREAM here.org\n::5  STREAM\n',
                'there.org': '192.0.2.7  STREAM there.org\n'}.get(name, '')

    def start(self, app):
        if app in self.jobs:
            return Result(1, '', 'start: Job is already running: %s\n' % app)
        if self.read('/etc/init/%s.conf' % app) is None:
            return Result(1, '', 'start: Unknown job: %s\n' % app)
        assert self.read('/etc/init/%s.override' % app) == 'manual\n'
        image = self.images[app + ':latest']['Id']
        if 'dies' not in image:
            name = self.jobs[app] = 'job%d' % self.next()
            self.containers[name] = self.container('c' + name, image)
            self.docker_start('', name)

    def stop(self, app):
        assert self.read('/etc/init/%s.override' % app) == 'manual\n'
        if app not in self.jobs:
            return Result(1, '', 'stop: Unknown instance: \n')
        if 'deaf' not in self.containers[self.jobs[app]]['Image']:
            del self.containers[self.jobs[app]]
        del self.jobs[app]

    def status(self, app):
        if app in self.jobs:
            return '%s start/running, process %s\n' % (app, self.jobs[app][3:])
        return app + ' stop/waiting\n'

    def systemctl(self, verb):
        assert verb == 'is-system-running'
        return self.state + '\n'

    def service(self, name, verb):
        if (name, verb) == ('docker', 'restart'):
            return shutil.rmtree(self.host.path('/proc/60'))
        assert (name, verb) == ('nginx', 'start')
        return self.nginx()

    # nginx

    def nginx(self):
        self.write('/run/nginx.pid', '50\n')
        self.process(50, 1, 'nginx: master process')
        self.nginx_s('-s', 'reload')

    def process(self, pid, parent, title):
        self.write('/proc/%d/stat' % pid, '%d (ngi) nx) S %d 1' % (pid, parent))
        self.write('/proc/%d/cmdline' % pid, title + '\0')

    def nginx_v(self, _):
        return Result(0, '', 'nginx version: nginx/1.24.0\n')

    def nginx_t(self, t, q, c='-c', path='/etc/nginx/nginx.conf'):
        for name in re.findall(r'include (\S+/\.dockhand\S+);', self.read(path)):
            found = self.read(name)
            if 'broken' in found:
                line = found[:found.index('broken')].count('\n') + 1
                return Result(1, '', 'nginx: [emerg] broken in %s:%d\n' % (name, line))

    def nginx_s(self, s, reload):
        for pid in os.listdir(self.host.path('/proc')):
            if pid != '50':
                shutil.rmtree(self.host.path('/proc', pid))
        self.process(self.next(), 50, 'nginx: worker process')
        self.process(51, 50, 'nginx: worker process is shutting down')
        self.process(52, 1, 'nginx: worker process')
        self.served = dh.proxy_files(self.host)

    # git and files

    def git(self, folder, verb, *words):
        assert folder == '--git-dir=' + self.host.path('/home/git/blog.git')
        if verb == 'read-tree':
            self.index = self.commits[words[0]]
        if verb.startswith('--work-tree='):
            assert words == ('checkout-index', '-a')
            self.check_out(verb.partition('=')[2])
        if verb == 'for-each-ref':
            return self.refs.get(words[-1], '') + '\n'
        if verb == 'symbolic-ref':
            self.head = words[-1]
            return 'refs/heads/master\n'
        if verb == 'rev-list':
            return 'commit\n' if words[-1] in self.commits else Result(128, '', 'fatal\n')
        if verb == 'update-ref' and words[0] == '-d':
            self.refs.pop(words[1], None)
        elif verb == 'update-ref':
            self.refs[words[0]] = words[1]

    def mkdir(self, folder):
        os.mkdir(folder)

    def check_out(self, folder):
        for name, text in self.index.items():
            with open(os.path.join(folder, name), 'wb') as target:
                target.write(dh.to_bytes(text))

    def rm(self, *words):
        assert words[:2] == ('-rf', '--') and words[2:]
        for path in words[2:]:
            assert path.startswith(self.root + '/')
            shutil.rmtree(path, ignore_errors=True)

    # installing

    def which(self, name):
        return '/usr/bin/' + name

    def useradd(self, *words):
        self.write('/etc/passwd', '%s:x:%d:%d::/home/%s:/bin/sh\n'
                   % (words[-1], USER, GROUP, words[-1]))

    def sudo(self, *words):
        assert words == ('-n', '/usr/local/lib/dockhand/receive', 'check')

    def sshd(self, option):
        return 'authorizedkeysfile .ssh/authorized_keys .ssh/authorized_keys2\n'

    def visudo(self, *words):
        """Finds nothing wrong, as these find nothing to say."""

    ssh_keygen = dpkg_query = visudo

    # what the tests look at

    def files(self, *besides):
        """{path: (text or target, mode, owner)} of all files but processes and locks."""
        found = {}
        for folder, folders, names in os.walk(self.root):
            for path in [os.path.join(folder, name) for name in folders + names]:
                short = path[len(self.root):]
                if not short.startswith(('/proc', '/run/lock') + besides):
                    found[short] = (content(path), mode_of(path), owner_of(path))
        return found

    def running(self):
        return sorted(each['Image'] for each in self.containers.values()
                      if each['State']['Running'])

    def whole(self):
        """All that must be as before when a deploy of release 2 fails."""
        found = self.files('/var/lib/dockhand/apps/blog/releases/2')
        found.update((tag, image['Id']) for tag, image in self.images.items())
        found.update((name, each['policy']) for name, each in self.containers.items()
                     if not name.startswith('job'))
        return dict(found, refs=self.refs.copy(), running=self.running(),
                    jobs=sorted(self.jobs), served=self.served)

    def changed(self, before):
        now = self.whole()
        return sorted(key for key in set(before) | set(now)
                      if before.get(key, 0) != now.get(key, 0))

    def release(self, number, commit, files, seconds=None):
        """A Release of these files, built, as a deploy makes it before the switch."""
        tag, self.commits[commit] = 'blog:%d' % number, files
        self.images[tag] = image(files['Dockerfile'])
        self.refs['refs/dockhand/%d' % number] = commit
        release = dh.Release('blog', number, commit, 'main', 'anna', 1, seconds, None,
                             self.images[tag]['Id'], JOB_HEADER + files['upstart.conf'],
                             PROXY_HEADER + files['nginx-proxy.conf'])
        dh.save_release(self.host, release)
        return release

    def lives(self, files):
        """Release 1, as a deploy would have left it."""
        live, engine = self.release(1, SHA, files, 2.5), dh.choose_engine(self.host)
        self.images['blog:latest'] = self.images['blog:1']
        self.refs['refs/heads/main'] = SHA
        dh.set_link(self.host, 'blog', 'live', live)
        for act in (engine.prepare, engine.place, engine.start, engine.settle):
            act(live)
        self.nginx()
        dh.install_proxy(self.host, 'blog', live.proxy, True)
        del self.done[:]
        return live

    def push(self, files, ref=MAIN, old=SHA, new=SHA_2):
        self.commits[new] = files
        dh.deploy(self.host, 'blog', 'anna', ref, old, new)
        self.refs[ref] = new

def image(dockerfile):
    return {'Id': 'sha256:' + re.sub(r'\W', '', dockerfile), 'Size': 5000000, 'Config': {
        'Volumes': {'/data': {}} if 'VOLUME' in dockerfile else None}}

def content(path):
    if os.path.islink(path):
        return os.readlink(path)
    if os.path.isfile(path):
        with open(path, 'rb') as source:
            return source.read()

JOB_HEADER = "# dockhand: blog's job, installed from its repository at each push\n"
PROXY_HEADER = JOB_HEADER.replace('job', 'proxy file')
JOB = 'start on started docker\nexec docker run --rm blog\n'
WEB = 'server { listen 80; server_name blog.example.org; location / { root /x; } }\n'
FILES = {'Dockerfile': 'FROM one', 'upstart.conf': JOB, 'nginx-proxy.conf': WEB}
FILES_2 = {'Dockerfile': 'FROM two', 'upstart.conf': JOB + 'respawn\n',
           'nginx-proxy.conf': WEB.replace('blog.', 'www.')}
SHORT = {'docker': 'Dockerfile', 'job': 'upstart.conf', 'proxy': 'nginx-proxy.conf'}

def but(name, text):
    """The second commit's files with another text for one (None: without it)."""
    files = dict(FILES_2, **{SHORT.get(name, name): text})
    return dict((name, text) for name, text in files.items() if text is not None)

DOCKER_PROXY = 'docker-proxy -proto tcp -host-ip %s -host-port 8000 -container-ip 172.17.0.2'
PUBLISHED_8000 = {'Ports': {'80/tcp': [{'HostIp': '', 'HostPort': '8000'}], '81/tcp': None}}

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
        assert refusal(dh.free_ports, machine.host, 0).startswith(said)
    else:
        dh.free_ports(machine.host, 0)
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
    dh.free_ports(machine.host, 0)
    assert machine.done == []

@pytest.mark.parametrize('parent, settings', [(40, PUBLISHED_8000), (41, {})])
def test_recover_leaves_the_ports_of_containers_and_of_other_engines(tmpdir, parent, settings):
    machine = Machine(tmpdir, 'systemd')
    machine.lives(FILES)
    machine.write('/run/docker.pid', '40\n')
    machine.process(60, parent, (DOCKER_PROXY % '0.0.0.0').replace(' ', '\0'))
    machine.containers['blog--1']['NetworkSettings'] = settings
    dh.recover(machine.host)
    assert not [line for line in machine.done if 'service' in line]

def test_at_boot_nginx_is_left_to_start_once_dockhand_has_recovered(tmpdir):
    machine = Machine(tmpdir, 'systemd')
    machine.state = 'starting'
    dh.reload_nginx(machine.host)
    assert machine.served is None
    machine.state = 'degraded'
    dh.reload_nginx(machine.host)
    assert machine.served == {}

def test_an_nginx_that_does_not_start_is_told_with_its_last_complaint(plain):
    plain.broken['service nginx'] = 1
    plain.write('/var/log/nginx/error.log', 'x [notice] a\nx [emerg] bind() failed\nb\n')
    assert refusal(dh.reload_nginx, plain.host) == 'nginx does not start: x [emerg] bind() failed'

@pytest.fixture(params=['none', 'upstart'])
def machine(request, tmpdir):
    return Machine(tmpdir, request.param)

@pytest.fixture
def plain(tmpdir):
    return Machine(tmpdir)


# ---------------------------------------------------------------------------------------
# Deploying
# ---------------------------------------------------------------------------------------

BUILD = '''rm -rf -- /var/lib/dockhand/build/blog
mkdir /var/lib/dockhand/build/blog
nginx -t -q -c /etc/nginx/.dockhand-blog.nginx
docker build --force-rm -t blog:2 /var/lib/dockhand/build/blog
rm -rf -- /var/lib/dockhand/build/blog
'''
ORDER = {'none': BUILD + '''nginx -t -q -c /etc/nginx/.dockhand-blog.nginx
docker create --name blog--2 --log-driver=json-file \
--log-opt=max-size=10m --log-opt=max-file=3 sha256:FROMtwo
docker update --restart no blog--1
docker stop -t 5 blog--1
docker tag blog:2 blog:latest
nginx -t -q -c /etc/nginx/.dockhand-blog.nginx
nginx -s reload
docker start blog--2
docker update --restart unless-stopped blog--2''', 'upstart': BUILD + '''nginx -t -q -c /etc/nginx/.dockhand-blog.nginx
stop blog
docker tag blog:2 blog:latest
nginx -t -q -c /etc/nginx/.dockhand-blog.nginx
nginx -s reload
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
    live = dh.live_release(machine.host, 'blog')
    assert (live.number, live.commit, live.branch, live.key, live.image, live.proxy) == (
        2, SHA_2, 'main', 'anna', 'sha256:FROMtwo', proxy)
    assert not re.search('pending|override|build/blog|nginx/.dock', str(machine.files()))
    said = capfd.readouterr().err
    assert re.findall('-----> (.*)', re.sub(r'\d\.\d s', 'N s', said)) == [
        'Checking 2222222222', 'Building blog:2', 'Switching to release 2',
        'Release 2 is live: built in N s, switched in N s, checked in N s, down for N s']
    assert re.search(r'\n       disk: \d+\.\d MB (more|less)\n', said)
    assert '       Step 1/1 : FROM two\n' in said

@table('init, broken', '''
    none    => docker create
    none    => docker stop
    none    => docker tag
    none    => docker start
    none    => nginx -t
    none    => nginx -s
    upstart => stop
    upstart => docker tag
    upstart => timeout 60 start
    upstart => nginx -s''')
def test_a_switch_that_fails_at_any_command_is_put_back(tmpdir, init, broken):
    machine = Machine(tmpdir, init)
    machine.lives(FILES)
    before = machine.whole()
    machine.broken[broken] = 1
    assert 'broken on purpose' in refusal(machine.push, FILES_2)
    assert machine.changed(before) == []
    record = machine.read('/var/lib/dockhand/apps/blog/releases/2/release.json')
    assert 'broken on purpose' in json.loads(record)['failed']
    assert dh.load_release(machine.host, 'blog', 2).seconds is None

def test_an_app_that_dies_at_once_is_put_back_with_the_end_of_its_log(machine, capfd):
    machine.lives(FILES)
    before = machine.whole()
    said = refusal(machine.push, but('docker', 'FROM dies'))
    assert said.startswith('release 2 failed its health check: it does not run: ')
    assert machine.changed(before) == []
    err = capfd.readouterr().err
    assert '       its last words\n' in err
    assert err.endswith('-----> Release 1 runs as before\n')

@table('broken', '''
    none
    docker create
    docker tag
    docker start
    timeout 60 start
    nginx -s''')
def test_a_first_deploy_that_fails_leaves_nothing(machine, broken):
    machine.nginx()
    dh.write_catch_all(machine.host)
    dh.make_folder(machine.host.path('/var/lib/dockhand/apps'))
    before = machine.whole()
    for _ in range(2):
        machine.broken[broken] = 1
        assert refusal(lambda: machine.push(but('docker', 'FROM dies'), old=ZERO))
        assert machine.changed(before) == []

def test_what_cannot_be_put_back_is_told_and_recover_mends_it_later(machine, capfd):
    machine.lives(FILES)
    before = machine.whole()
    machine.broken.update({'docker start': 9, 'timeout 60 start': 9})
    assert refusal(machine.push, FILES_2)
    err = capfd.readouterr().err
    assert 'dockhand: could not be put back: ' in err
    assert err.endswith('dockhand: mend that, then: sudo dockhand recover\n')
    assert dh.linked_release(machine.host, 'blog', 'pending').number == 2
    assert machine.running() == []
    machine.broken.clear()
    dh.recover(machine.host)
    assert machine.changed(before) == []
    assert 'blog: the switch to release 2 was interrupted' in capfd.readouterr().err

def half_deployed(machine, steps=99):
    """A crash after so many steps of a switch to release 2."""
    live, new = machine.lives(FILES), machine.release(2, SHA_2, FILES_2)
    dh.set_link(machine.host, 'blog', 'pending', new)
    acts = [lambda: dh.choose_engine(machine.host).prepare(new)]
    for act in (acts + dh.switch_steps(machine.host, live, new))[:steps]:
        act()
    return new

@pytest.mark.parametrize('steps', range(7))
def test_a_crash_at_any_step_is_put_right_by_recover(machine, tmpdir, steps):
    other = Machine(tmpdir.mkdir('other'), machine.init)
    other.lives(FILES)
    half_deployed(machine, steps)
    for _ in range(2):
        dh.recover(machine.host)
        found, wanted = machine.whole(), other.whole()
        assert machine.running() == ['sha256:FROMone'] and machine.served == other.served
        assert [path for path in set(found) ^ set(wanted) if 'other' not in path] == []

def test_a_crash_after_the_commit_point_keeps_the_new_release(machine):
    new = half_deployed(machine)
    dh.set_link(machine.host, 'blog', 'live', new)
    dh.recover(machine.host)
    assert machine.running() == ['sha256:FROMtwo']
    live = dh.live_release(machine.host, 'blog')
    assert live == new._replace(seconds=live.seconds) and live.seconds > 1
    assert machine.refs['refs/heads/main'] == SHA_2
    assert not re.search('pending|override', str(machine.files()))
    assert machine.init == 'upstart' or (
        machine.containers['blog--2']['policy'] == 'unless-stopped')

def test_a_power_cut_after_the_commit_point_is_followed_by_a_start(machine):
    dh.set_link(machine.host, 'blog', 'live', half_deployed(machine))
    machine.jobs.clear()
    for container in machine.containers.values():
        container['State']['Running'] = False
    dh.recover(machine.host)
    assert machine.running() == ['sha256:FROMtwo']
    assert not re.search('pending|override', str(machine.files()))

def test_what_was_put_back_but_is_not_well_is_told_and_leaves_nothing_to_do(plain, capfd):
    plain.lives(FILES)
    start = plain.docker_start
    plain.docker_start = lambda *words: start(*words) or plain.containers['blog--1'][
        'State'].update(Health={'Status': 'unhealthy'})
    assert 'does not run' in refusal(plain.push, but('docker', 'FROM dies'))
    assert ('dockhand: release 1 was started again, but: its HEALTHCHECK says unhealthy'
            in capfd.readouterr().err)
    assert dh.linked_release(plain.host, 'blog', 'pending') is None

def test_what_is_still_to_be_put_back_is_neither_cleaned_up_nor_forgotten(plain):
    plain.lives(FILES)
    plain.broken['docker start'] = 9
    assert refusal(plain.push, FILES_2)
    dh.after_push(plain.host, 'blog')
    plain.broken['docker start'] = 1
    dh.start(plain.host, 'blog')
    assert dh.linked_release(plain.host, 'blog', 'pending').number == 2
    dh.recover(plain.host)
    assert dh.linked_release(plain.host, 'blog', 'pending') is None
    assert plain.running() == ['sha256:FROMone']

def test_what_is_left_of_a_removal_that_was_killed_keeps_no_other_app_down(plain, capfd):
    plain.lives(FILES)
    shutil.rmtree(dh.release_folder(plain.host, 'blog', 1))
    dh.recover(plain.host)
    dh.apps(plain.host)
    assert not re.search('live|releases', str(plain.files('/home')))
    assert capfd.readouterr().out == 'no apps yet\n'

@pytest.mark.skipif(os.getuid() != 0, reason='only root can give a folder away')
def test_locks_in_a_folder_of_somebody_else_are_refused(plain):
    folder = plain.host.path(dh.LOCKS)
    dh.make_folder(folder)
    plain.write('/etc/shadow', 'kept')
    os.symlink(plain.host.path('/etc/shadow'), folder + '/blog')
    os.chown(folder, USER, GROUP)
    assert 'somebody else made' in refusal(dh.stop, plain.host, 'blog')
    assert plain.read('/etc/shadow') == 'kept'

def test_a_crash_in_a_first_build_leaves_nothing_once_recovered(machine):
    machine.nginx()
    dh.write_catch_all(machine.host)
    dh.make_folder(machine.host.path('/var/lib/dockhand/apps'))
    before = machine.whole()
    machine.release(1, SHA, FILES)
    dh.recover(machine.host)
    assert machine.changed(before) == []

@pytest.mark.parametrize('name, text, said', [
    ('docker', None, 'no Dockerfile in this commit'), ('docker', '\n', 'file is empty'),
    ('docker', 'a\0', 'file holds a NUL byte'), ('job', '', 'upstart.conf is empty'),
    ('docker', 'x' * (256 * 1024 + 1), 'Dockerfile is larger than 256 KB'),
    ('job', None, 'no upstart.conf in this commit'),
    ('job', JOB + 'x\n', 'upstart.conf:3: unknown stanza `x`'),
    ('job', 'exec docker run -d blog', 'upstart.conf:1: `-d`'),
    ('job', dh.to_text(b'\xef\xbb\xbf') + JOB, 'upstart.conf:1: begins with a byte order'),
    ('proxy', dh.to_text(b'\xef\xbb\xbf') + WEB, 'nginx-proxy.conf:1: begins with a byte'),
    ('proxy', '\0', 'nginx-proxy.conf holds a NUL byte'),
    ('proxy', '\n\nbroken;\n', 'nginx-proxy.conf:3: broken'),
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

def test_a_container_of_that_name_that_is_not_ours_is_left_alone(plain):
    plain.lives(FILES)
    theirs = plain.containers['blog--2'] = plain.container('x', 'y')
    assert 'docker has blog--2 already, and not from' in refusal(plain.push, FILES_2)
    assert plain.containers.get('blog--2') is theirs

@table('path, name', '''
    /etc/nginx/conf.d/blog.conf => nginx-proxy.conf
    /etc/init/blog.conf         => upstart.conf''')
def test_a_file_edited_on_the_server_is_not_overwritten(tmpdir, capfd, path, name):
    machine = Machine(tmpdir, 'upstart')
    machine.lives(FILES)
    edited = machine.read(path) + '# mine\n'
    machine.write(path, edited)
    assert refusal(machine.push, FILES_2) == (
        'to keep that, commit it in %s and push; to drop it: sudo rm %s, and try again'
        % (name, path))
    assert machine.read(path) == edited and machine.running() == ['sha256:FROMone']
    assert '       +# mine\n' in capfd.readouterr().err

def test_what_is_live_already_is_accepted_at_once(machine):
    machine.lives(FILES)
    machine.push(FILES, new=SHA)
    machine.push({}, 'refs/tags/v1', ZERO)
    assert machine.done == []

def test_the_loser_of_two_pushes_is_refused_before_anything_is_built(machine):
    machine.lives(FILES)
    assert 'another push went live: pull, then push again' in refusal(
        lambda: machine.push(FILES_2, old=SHA_3))
    assert machine.done == []

def test_a_branch_that_a_crash_left_behind_is_set_to_what_is_live(plain):
    plain.lives(FILES)
    plain.refs['refs/heads/main'] = SHA_3
    plain.write('/home/git/blog.git/refs/heads/main.lock', '')
    assert 'another push went live' in refusal(lambda: plain.push(FILES_2, old=SHA_3))
    assert plain.refs['refs/heads/main'] == SHA
    assert plain.running() == ['sha256:FROMone']
    assert plain.read('/home/git/blog.git/refs/heads/main.lock') is None

@pytest.mark.parametrize('ref, new', [
    ('refs/heads/feature', SHA), ('refs/heads/main', ZERO), ('refs/replace/' + SHA, SHA)])
def test_a_ref_that_is_refused_builds_nothing(machine, ref, new):
    machine.lives(FILES)
    assert refusal(lambda: machine.push(FILES_2, ref, SHA, new))
    assert machine.done == [] and machine.refs['refs/heads/main'] == SHA

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
                 'ports: ::1:81 -> 80/tcp, now none', 'image: sha256:FROMtwo (5.0 MB)',
                 'gap: one stop and one start of the service'):
        assert '       %s\n' % line in err

def test_a_push_without_the_proxy_file_removes_the_old_one(plain):
    live = plain.lives(FILES)
    for act in dh.switch_steps(plain.host, live, live._replace(proxy=None), run=False):
        act()
    assert plain.read('/etc/nginx/conf.d/blog.conf') is None and plain.served == {}

def test_a_proxy_file_that_is_not_ours_is_not_removed(plain):
    plain.write('/etc/nginx/conf.d/blog.conf', WEB)
    dh.install_proxy(plain.host, 'blog', None)
    assert plain.read('/etc/nginx/conf.d/blog.conf') == WEB

def test_a_reload_counts_when_the_earlier_workers_have_gone(plain):
    plain.nginx()
    earlier, reload = dh.nginx_workers(plain.host, '50'), plain.nginx_s
    plain.nginx_s = lambda *words: threading.Timer(0.05, reload, words).start()
    dh.reload_nginx(plain.host)
    assert earlier and not set(earlier) & set(dh.nginx_workers(plain.host, '50'))

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

@each('name', 'redis blog:old')
def test_a_job_that_runs_another_image_can_be_deployed(plain, name):
    plain.images[name] = image('FROM other')
    live, new = plain.lives(FILES), plain.release(2, SHA_2, but('job', JOB.replace(
        'blog', name)))
    for act in [lambda: dh.Containers(plain.host).prepare(new)] + \
            dh.switch_steps(plain.host, live, new):
        act()
    assert plain.running() == ['sha256:FROMother']

def test_a_container_that_ignores_its_signal_is_stopped_too(tmpdir):
    machine = Machine(tmpdir, 'upstart')
    live = machine.lives(but('docker', 'FROM deaf'))
    dh.Upstart(machine.host).stop(live)
    assert machine.running() == []

def test_a_stopped_app_is_not_started_by_recover_a_dead_container_is(machine):
    machine.lives(FILES)
    dh.stop(machine.host, 'blog')
    assert machine.running() == []
    dh.recover(machine.host)
    assert machine.running() == []
    os.unlink(dh.app_folder(machine.host, 'blog', 'stopped'))
    dh.recover(machine.host)
    assert machine.running() == ['sha256:FROMone']

def test_a_stopped_app_stays_stopped_when_a_push_fails(machine):
    machine.lives(FILES)
    dh.stop(machine.host, 'blog')
    before = machine.whole()
    assert refusal(machine.push, but('docker', 'FROM dies'))
    assert machine.changed(before) == [] and machine.running() == []

def test_removing_an_app_leaves_nothing_of_it(machine):
    machine.lives(FILES)
    machine.write('/home/git/blog.git/config', '')
    assert 'dockhand destroy blog --force' in refusal(dh.destroy, machine.host, 'blog')
    assert machine.running() == ['sha256:FROMone']
    dh.destroy(machine.host, 'blog', force=True)
    assert machine.images == machine.containers == machine.jobs == machine.served == {}
    assert not [path for path in machine.files() if 'blog' in path]
    assert 'no app blog here' in refusal(dh.destroy, machine.host, 'blog', True)

# ---- Releases: put back, rolled back, cleaned up ------------------------------------

def pushed(machine, *commits):
    """Releases of these commits after the first, the last one live; what was before."""
    engine, old = dh.choose_engine(machine.host), machine.lives(FILES)
    before = machine.whole()
    for number, commit in enumerate(commits, 2):
        files = but('docker', 'FROM ' + commit[:3])
        new = machine.release(number, commit, files, 2.5)
        engine.prepare(new)
        for act in dh.switch_steps(machine.host, old, new):
            act()
        engine.settle(new)
        old = new
    dh.set_link(machine.host, 'blog', 'live', old)
    machine.refs[MAIN] = commits[-1]
    del machine.done[:]
    return before

def test_a_rollback_brings_back_image_job_proxy_and_branch_without_a_build(machine):
    before = pushed(machine, SHA_2)
    dh.rollback(machine.host, 'blog')
    found = machine.whole()
    for key in ('blog:2', 'blog--2', 'refs', 'jobs'):
        before.pop(key, None), found.pop(key, None)
    assert found == before and machine.refs[MAIN] == SHA
    assert not [line for line in machine.done if line.startswith('docker build')]
    dh.rollback(machine.host, 'blog', '2')
    assert machine.running() == ['sha256:FROM222'] and machine.refs[MAIN] == SHA_2

@table('number, said', '''
    1 => release 1 cannot run again: its image blog:1 was removed; nothing has changed
    2 => release 2 is not one to go back to: see dockhand releases blog
    3 => release 3 is not one to go back to: see dockhand releases blog
    x => release x is not one to go back to: see dockhand releases blog''')
def test_a_rollback_to_what_cannot_run_changes_nothing(machine, number, said):
    pushed(machine, SHA_2)
    assert refusal(machine.push, but('docker', 'FROM dies'), MAIN, SHA_2, SHA_3)
    del machine.images['blog:1']
    before = machine.whole()
    assert refusal(dh.rollback, machine.host, 'blog', number) == said
    assert machine.changed(before) == []

@table('init, broken', '''
    none    => docker stop
    none    => docker start
    none    => nginx -s
    upstart => stop
    upstart => timeout 60 start
    upstart => docker tag''')
def test_a_rollback_that_fails_is_put_back_and_can_be_tried_again(tmpdir, init, broken):
    machine = Machine(tmpdir, init)
    pushed(machine, SHA_2)
    before = machine.whole()
    machine.broken[broken] = 1
    assert 'broken on purpose' in refusal(dh.rollback, machine.host, 'blog')
    assert machine.changed(before) in ([], ['blog--1'])     # stopped, of either policy
    dh.rollback(machine.host, 'blog')
    assert machine.running() == ['sha256:FROMone']

@pytest.mark.parametrize('live', [False, True])
def test_a_crash_in_a_rollback_leaves_one_whole_release(machine, live):
    pushed(machine, SHA_2)
    older = dh.load_release(machine.host, 'blog', 1)
    dh.set_link(machine.host, 'blog', 'pending', older)
    if live:
        dh.set_link(machine.host, 'blog', 'live', older)
        machine.containers['blog--1'] = machine.container('c1', older.image)
    dh.recover(machine.host)
    kept = [each.number for each in dh.kept_releases(machine.host, 'blog')]
    assert kept == ([1, 2] if live else [2, 1])
    assert machine.refs['refs/heads/main'] == (SHA if live else SHA_2)

def test_releases_are_listed_with_what_became_of_them(plain, capfd):
    pushed(plain, SHA_2)
    assert refusal(plain.push, but('job', 'x\n'), MAIN, SHA_2, SHA_3)
    capfd.readouterr()
    dh.releases(plain.host, 'blog')
    lines = capfd.readouterr().out.splitlines()
    assert re.match(r'   3  3{10}  \d{4}-\d\d-\d\d \d\d:\d\d  anna +-  failed: '
                    'upstart.conf:1: unknown stanza `x`', lines[0])
    assert re.match(r'   2  2{10}  .*  anna +\d+\.\d s  live\Z', lines[1])
    assert re.match(r'   1  1{10}  .*  anna +2\.5 s  kept\Z', lines[2])
    assert 'no app wiki here' in refusal(dh.releases, plain.host, 'wiki')

def test_five_releases_are_kept_and_what_goes_is_told(machine, capfd):
    pushed(machine, *[number * 40 for number in '234567'])
    dh.set_link(machine.host, 'blog', 'live', dh.load_release(machine.host, 'blog', 3))
    capfd.readouterr()
    dh.after_push(machine.host, 'blog')
    assert [each.number for each in dh.kept_releases(machine.host, 'blog')] == [
        7, 6, 5, 4, 3]
    assert sorted(machine.images) == ['blog:%d' % number for number in range(3, 8)] + [
        'blog:latest']
    assert sorted(ref for ref in machine.refs if 'dockhand' in ref) == [
        'refs/dockhand/%d' % number for number in range(3, 8)]
    assert machine.init == 'upstart' or sorted(machine.containers) == [
        'blog--%d' % number for number in range(3, 8)]
    err = capfd.readouterr().err
    assert re.search(r'-----> Release 1 is removed, \d+\.\d MB freed\n', err)
    assert 'with what its container wrote outside volumes: /srv/kept.db\n' in err

def test_what_a_failed_build_left_goes_with_the_next_clean_up(plain):
    pushed(plain, SHA_2)
    build = plain.docker_build
    plain.docker_build = lambda *words: plain.each(' ---> 0123456789ab') or build(*words)
    for text, left in (('RUN fail', '0123456789ab'), ('FROM dies', 'sha256:FROMdies')):
        assert refusal(plain.push, but('docker', text), MAIN, SHA_2, SHA_3)
        dh.after_push(plain.host, 'blog')
        assert 'docker rmi ' + left == plain.done[-1]
        dh.after_push(plain.host, 'blog')
    assert len([line for line in plain.done if line.startswith('docker rmi ')]) == 4
    assert [each.number for each in dh.kept_releases(plain.host, 'blog')] == [2, 1]

def test_a_failed_build_takes_no_image_along_that_has_a_name(plain):
    pushed(plain, SHA_2)
    build = plain.docker_build
    plain.docker_build = lambda *words: plain.each(' ---> 0123456789ab') or build(*words)
    plain.images['base:1'] = {'Id': '0123456789ab', 'RepoTags': ['base:1']}
    assert refusal(plain.push, but('docker', 'RUN fail'), MAIN, SHA_2, SHA_3)
    dh.after_push(plain.host, 'blog')
    assert 'docker rmi 0123456789ab' not in plain.done

def test_what_was_live_last_is_kept_and_what_a_rollback_goes_to(plain):
    pushed(plain, *[number * 40 for number in '23456'])
    dh.rollback(plain.host, 'blog', '2')
    plain.push(but('docker', 'FROM 7'), MAIN, '2' * 40, '7' * 40)
    dh.after_push(plain.host, 'blog')
    assert [each.number for each in dh.kept_releases(plain.host, 'blog')] == [
        7, 2, 6, 5, 4]
    assert dh.earlier_release(plain.host, dh.live_release(plain.host, 'blog'), None
                              ).number == 2

def test_a_release_whose_image_a_container_uses_stays(plain, capfd):
    pushed(plain, *[number * 40 for number in '23456'])
    plain.docker_rmi = lambda *words: Result(1, '', 'conflict: container x is using it\n')
    dh.after_push(plain.host, 'blog')
    assert 'Release 1 stays: a container uses its image\n' in capfd.readouterr().err
    assert dh.list_releases(plain.host, 'blog') == [1, 2, 3, 4, 5, 6]
    assert plain.refs['refs/dockhand/1'] == SHA

def test_what_is_gone_of_a_live_release_is_brought_back(machine):
    machine.lives(FILES)
    before = machine.whole()
    del machine.images['blog:latest']
    machine.containers.clear()
    machine.jobs.clear()
    for path in ('/etc/nginx/conf.d/blog.conf', '/etc/init/blog.conf'):
        dh.remove_file(machine.host.path(path))
    for _ in range(2):
        dh.recover(machine.host)
        assert machine.changed(before) == []

def test_recover_goes_on_with_the_next_app(plain, capfd):
    plain.lives(FILES)
    live = dh.live_release(plain.host, 'blog')._replace(app='alone')
    dh.save_release(plain.host, live)
    dh.set_link(plain.host, 'alone', 'live', live)
    plain.images.clear()
    assert refusal(dh.recover, plain.host) == '2 app(s) could not be put right'
    assert re.findall('dockhand: (.*)', capfd.readouterr().err) == [
        '%s: the image of release 1 is gone: sudo dockhand rebuild %s' % (app, app)
        for app in ('alone', 'blog')]

def test_a_push_without_room_for_a_build_is_refused(plain):
    assert re.match(r'\d+ MB are free on /var/lib/docker, a build wants 99999999: ',
                    refusal(dh.check_space, plain.host, 99999999))
    plain.write('/etc/docker/daemon.json', '{"data-root": "/mnt/docker"}')
    dh.make_folder(plain.host.path('/mnt/docker'))
    assert 'on /mnt/docker' in refusal(dh.check_space, plain.host, 99999999)
    dh.check_space(plain.host, 1)

@table('name, said', '''
    here.org  => -----> blog: http://here.org:{0}/ answers 418
    there.org => -----> blog answers 418: curl -H 'Host: there.org' http://192.0.2.2:{0}/''')
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
    dh.after_push(plain.host, 'blog')
    thread.join()
    listener.close()
    assert said.format(port) in capfd.readouterr().err
    assert heard == [dh.to_bytes('GET / HTTP/1.0\r\nHost: %s\r\n\r\n' % name)]
    assert plain.head == 'refs/heads/main'
    assert dh.fetch_status(name, port).startswith('nothing (')

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
    id                      => bob =>            => "id" is not for this key''')
def test_a_key_reaches_its_apps_and_nothing_else(plain, command, name, apps, said):
    plain.write('/etc/init/etc.conf', 'not ours')
    with ssh_command(command):
        assert said in refusal(dh.serve, plain.host, name, *apps.split())
    assert os.listdir(plain.host.path('/home/git')) == [] and plain.done == []

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
    nonsense blog anna
    --help blog anna''', '')
def test_root_checks_again_what_the_git_user_asks(words):
    words = [word.strip('_') for word in words.replace('  ', '_ ').format(SHA).split(' ')]
    assert refusal(dh.receive, Host('/nowhere', run=None), *words)

# ---- Killed at any moment, the disk full at any write ----------------------------------

# What an act changes is found by looking: Python tells a profile function of each call of
# a function of C, and a run that nothing disturbs notes after which of them the disk, or
# what docker, git and init hold, is another than before. Later runs are killed there.
# What one effect leaves the next one finds: so that is before and after each of them.

HELD = 'images containers jobs commits refs served count'.split()
LOOKING = 'fspath read stat lstat fstat statvfs listdir readlink fdopen __exit__'.split()
FREEING = 'unlink remove rmdir truncate chmod chown fchmod fchown'.split()
GIT = 'git --git-dir=/home/git/blog.git '
HALVES = ('rm -rf', GIT + '--work')      # these commands are killed half-way too
FULL = ('docker build', 'docker tag', 'docker create', 'docker start', 'mkdir',
        GIT + '--work', GIT + 'update-ref refs')
TWICE = 'docker (build|start)|timeout|nginx'
MOST = 32                           # processes at a time: an app is watched for seconds

def deploy_two(machine):
    dh.deploy(machine.host, 'blog', 'anna', MAIN, machine.refs.get(MAIN, ZERO), SHA_2)

ACTS = {'first': deploy_two, 'deploy': deploy_two,
        'rollback': lambda machine: dh.rollback(machine.host, 'blog'),
        'recover': lambda machine: dh.recover(machine.host)}
RUNS = [('first', 'none'), ('first', 'upstart'), ('deploy', 'systemd'),
        ('deploy', 'upstart'), ('rollback', 'none'), ('rollback', 'upstart')]

def about_to(act, init, folder):
    """A Machine on which an act can begin."""
    machine = Machine(os.path.join(folder, 'machine'), init)
    if act == 'first':
        machine.nginx()
        dh.write_catch_all(machine.host)
        dh.make_folder(machine.host.path('/var/lib/dockhand/apps'))
    elif act == 'deploy':
        machine.lives(FILES)
    else:
        dh.set_link(machine.host, 'blog', 'live', half_deployed(machine))
        dh.recover(machine.host)
    machine.commits[SHA_2] = FILES_2
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
                self.command = line if event == 'call' else ''
                self.moment(event, line)
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

def standing(machine):
    """All that must be one release's, as {what: text}: times do not count, nor does it
    that a failed release is remembered."""
    found = machine.files('/run')
    for path in [path for path in found if path.endswith('/release.json')]:
        record = json.loads(dh.to_text(found[path][0]))
        if record['failed']:
            del found[path], found[os.path.dirname(path)]
        else:
            record.update(time=0, seconds=record['seconds'] is not None)
            found[path] = (json.dumps(record, sort_keys=True),) + found[path][1:]
    found.update((tag, image['Id']) for tag, image in machine.images.items())
    found.update((name, each['Image'] + each['policy'] * each['State']['Running'])
                 for name, each in machine.containers.items() if name[:3] != 'job')
    found.update(refs=sorted(machine.refs.items()), running=machine.running(),
                 jobs=sorted(machine.jobs), served=sorted(machine.served.items()))
    return dict((name, str(value)) for name, value in found.items())

def unnumbered(state):
    """A state whose live release has no number."""
    live = re.search(r'releases/(\d+)', state['/var/lib/dockhand/apps/blog/live'])
    pattern = r'(releases/|blog:|blog--|dockhand/|"number": )%s\b' % live.group(1)
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
    machine.refs[MAIN] = dh.live_release(machine.host, 'blog').commit
    return changes, moments, states + [standing(machine)]

def after_a_kill(act, init, states, at, folder):
    """What is wrong after a kill and `recover`, or if the same is pushed again then."""
    machine = about_to(act, init, folder)
    kill(act, machine, at)
    dh.recover(machine.host)
    now = standing(machine)
    wrong = differences(now, *states)
    if wrong or not is_new(machine, act, folder):
        return wrong
    dh.recover(machine.host)
    if act == 'rollback' or standing(machine) != now:
        return differences(standing(machine), now)
    deploy_two(machine)
    machine.refs[MAIN] = SHA_2
    return differences(unnumbered(standing(machine)), unnumbered(states[-1]))

def is_new(machine, act, folder):
    """Whether no other run has come to this state: from here all goes the same way."""
    state = [standing(machine), dh.list_releases(machine.host, 'blog'), act, machine.init]
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
        dh.recover(twin.host)
    return ['after %s: %s' % (moment[1], each)
            for moment, twin in zip([at] + changes, twins)
            for each in differences(standing(twin), *states)]

def copied(machine, root):
    shutil.copytree(machine.root, root, symlinks=True)
    twin = Machine(root, machine.init)
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
    if wanting or not said:         # `release 2 is live, but: ...; recover tries again`
        dh.recover(machine.host)
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

@pytest.fixture(scope='module')
def trials(request):
    """{(what happens, act, init): {moment: what is wrong then}}; all of them at a time,
    in memory where that is a file system too, since much of the time goes into fsync.
    Each Python tries a third, 3.7 another than 3.8; `-m 'whole or not whole'` all."""
    thirds = 1 if request.config.option.markexpr else 3
    memory = [folder for folder in ['/dev/shm'] if os.access(folder, os.W_OK)]
    folder = tempfile.mkdtemp(dir=(memory + [None])[0])
    try:
        explored = in_parallel([functools.partial(explore, *run) for run in RUNS],
                               os.path.join(folder, 'undisturbed'))
        tried = [each for run, found in zip(RUNS, explored)
                 for each in trials_of(*(run + tuple(found)))]
        now = range(sys.version_info[1] % thirds, len(tried), thirds)
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

runs = pytest.mark.parametrize('act, init', RUNS)

@runs
def test_every_kind_of_effect_is_found(trials, act, init):
    kinds = set(what.split()[0] for _, what, _ in trials['kill', act, init])
    assert kinds >= set('open flush fchmod rename unlink symlink docker nginx git'
                        .split())
    assert act == 'rollback' or kinds >= set(['mkdir', 'open:', 'rmdir:'])
    assert init != 'upstart' or kinds >= set(['stop', 'timeout'][act == 'first':])
    assert len(trials['kill', act, init]) > 40

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

# ---- Health ----------------------------------------------------------------------------

class Engine(object):
    """Gives its states one after the other, the last one for ever."""
    def __init__(self, *states):
        self.states, self.asked = list(states), 0

    def state(self, release):
        self.asked += 1
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

def state(alive=True, identity=1, ports=(), health=''):
    return dh.State(alive, identity, list(ports), health, 'exited with 1')

def unwell(engine, timeout=9, steady=9):
    return refusal(dh.check_health, None, engine, timeout, steady)

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
    dh.check_health(None, engine, 9, 1)
    assert engine.asked >= 5

@pytest.mark.parametrize('found, said', [
    (state(None), 'after 0 s it is not running yet'),
    (state(), 'after 0 s it is not running yet'),
    (state(health='starting'), 'after 0 s its HEALTHCHECK is still starting')])
def test_an_app_that_is_not_ready_in_time_fails_with_the_reason(found, said):
    assert unwell(Engine(found), timeout=0) == said

def test_an_app_answers_when_each_port_takes_a_connection():
    listener, closed = socket.socket(), socket.socket()
    for each in (listener, closed):
        each.bind(('127.0.0.1', 0))
    listener.listen(5)
    port, silent = listener.getsockname(), closed.getsockname()
    dh.check_health(None, Engine(state(ports=[port])), 9, 0)
    assert 'nothing listens on port %d of the container' % silent[1] in unwell(
        Engine(state(ports=[port, silent])), 0, 0)
    dh.check_health(None, Engine(state(ports=[silent], health='healthy')), 9, 0)
    closed.close()
    listener.close()


# ---------------------------------------------------------------------------------------
# Installing, keys, doctor
# ---------------------------------------------------------------------------------------

LAUNCHER = '''#!%s %s
import gc, os, sys
gc.disable()
sys.path.insert(0, '/usr/local/lib/dockhand')
import dockhand
os._exit(dockhand.main('{0}', 'git'))
''' % (sys.executable, '-Es' if sys.version_info[0] == 2 else '-IS')
RECEIVE = '/usr/local/lib/dockhand/receive'
HOOK = '#!/bin/sh\nexec sudo -n %s {0} "$DOCKHAND_APP" "$DOCKHAND_KEY"{1}\n' % RECEIVE
TEMPLATE = '/usr/local/lib/dockhand/template'
INSTALLED = [
    ('/usr/local/bin/dockhand', '755', LAUNCHER.format('dockhand')),
    (RECEIVE, '755', LAUNCHER.format('receive')),
    ('/etc/sudoers.d/dockhand', '440', 'git ALL=(root) NOPASSWD: %s\n' % RECEIVE),
    (TEMPLATE + '/hooks/update', '755', HOOK.format('update', ' "$@"')),
    (TEMPLATE + '/hooks/post-receive', '755', HOOK.format('post-receive', '')),
    (TEMPLATE + '/config', '644', '''[core]
\tbare = true
\thooksPath = hooks
[receive]
\tshallowUpdate = true
\tunpackLimit = 1
\tdenyDeleteCurrent = ignore
[transfer]
\thideRefs = refs/dockhand
[gc]
\tautoPackLimit = 20
\tbigPackThreshold = 32m
\tautoDetach = false
'''),
    ('/etc/nginx/conf.d/000-dockhand.conf', '644', PLAIN_ALL)]
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
WantedBy=multi-user.target
''')]}

@pytest.fixture(params=['none', 'upstart', 'systemd'])
def fresh(request, tmpdir):
    return Machine(tmpdir, request.param)

def test_install_writes_these_files_and_a_second_one_changes_nothing(fresh, capfd):
    dh.install(fresh.host)
    for path, mode, text in INSTALLED + BOOT[fresh.init]:
        assert (fresh.read(path), mode_of(fresh.host.path(path))) == (text, mode), path
    assert fresh.read('/usr/local/lib/dockhand/dockhand.py') == dh.read_file(
        re.sub('pyc$', 'py', dh.__file__))
    files = fresh.files()
    assert files['/usr/local/bin/gitreceive'][0] == '/usr/local/bin/dockhand'
    link = '/etc/systemd/system/multi-user.target.wants/dockhand-recover.service'
    assert files.get(link, [None])[0] == (dh.UNIT if fresh.init == 'systemd' else None)
    assert files['/var/lib/dockhand/build'][1:] == ('700', (USER, GROUP))
    assert fresh.served is not None
    out, done = capfd.readouterr().out, set(fresh.done)
    assert 'wrote /etc/sudoers.d/dockhand\n' in out and 'is installed; next: ' in out
    del fresh.done[:]
    dh.install(fresh.host)
    assert fresh.files() == files and capfd.readouterr().out == 'nothing changed\n'
    assert set(fresh.done) == set(['sudo -n %s check' % RECEIVE]) < done

def test_install_makes_the_user(plain):
    plain.write('/etc/passwd', 'root:x:0:0::/root:/bin/sh\n')
    dh.install(plain.host, user='push')
    assert 'useradd -m -d /home/push -s /bin/sh -p * push' in plain.done
    assert plain.read('/etc/sudoers.d/dockhand').startswith('push ALL=(root)')
    assert plain.read('/usr/local/bin/dockhand').endswith("('dockhand', 'push'))\n")
    assert dh.installed_user(plain.host) == 'push'

@table('line', '''
    git:x:0:0::/home/git:/bin/sh
    git:x:99:99::/home/git:/usr/sbin/nologin
    git:x:99:99::/home/git:/usr/bin/git-shell
    git:x:99:99::/home/git:/bin/false''')
def test_install_does_not_take_somebody_elses_user(plain, line):
    plain.write('/etc/passwd', line + '\n')
    before = plain.files()
    assert '--user NAME takes another' in refusal(dh.install, plain.host)
    assert plain.files() == before

def test_install_refuses_user_names_that_are_none(plain):
    assert 'is no name' in refusal(dh.install, plain.host, 'x;id')

def test_install_names_every_missing_requirement_at_once(plain, capfd):
    plain.which = lambda name: '' if name in ('nginx', 'visudo') else '/usr/bin/' + name
    plain.broken['docker version'] = 2
    before = plain.files()
    assert refusal(dh.install, plain.host).startswith('3 requirement(s) missing, nothing')
    assert re.findall('missing: (.*)\n +to bring it: (.*)', capfd.readouterr().out) == [
        ('nginx', 'apt-get install nginx'), ('visudo', 'apt-get install sudo'),
        ('docker does not answer: broken on purpose',
         'service docker start || dockerd &')]
    assert plain.files() == before and plain.done == []

def test_a_sudoers_file_that_sudo_would_not_read_is_not_put_in_place(plain):
    plain.broken['visudo -c -q -f /etc/sudoers.d/.dockhand.new'] = 1
    assert refusal(dh.install, plain.host).startswith('visudo -c -q -f')
    assert os.listdir(plain.host.path('/etc/sudoers.d')) == []

def test_a_sudo_that_ignores_the_file_is_named(plain):
    plain.broken['sudo -n'] = 1
    assert 'must have `#includedir /etc/sudoers.d`' in refusal(dh.install, plain.host)

def test_the_default_site_is_disabled_only_if_it_is_untouched(plain):
    site, link = '/etc/nginx/sites-available/default', '/etc/nginx/sites-enabled/default'
    plain.write(site, 'server { listen 80 default_server; }')
    dh.make_folder(plain.host.path('/etc/nginx/sites-enabled'))
    os.symlink('../sites-available/default', plain.host.path(link))
    for text, kept in (('edited', True), (plain.read(site), False)):
        checksum = hashlib.md5(dh.to_bytes(text)).hexdigest()
        plain.dpkg_query = lambda *words: ' %s %s\n' % (site, checksum)
        dh.install(plain.host)
        assert os.path.lexists(plain.host.path(link)) == kept and plain.read(site)

def test_a_broken_nginx_is_said_before_the_catch_all_is_written(plain):
    plain.broken['nginx -t'] = 2
    assert 'is broken, mend it first' in refusal(dh.install, plain.host)
    assert plain.read(dh.CATCH_ALL) is None

@contextmanager
def standard_input(data):
    kept, stream = sys.stdin, io.BytesIO(data)
    sys.stdin = stream if sys.version_info[0] == 2 else io.TextIOWrapper(stream)
    try:
        yield
    finally:
        sys.stdin = kept

def upload(machine, text, *words):
    with standard_input(dh.to_bytes(text)):
        dh.upload_key(machine.host, *words)

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
        'anna ssh-ed25519 %s may push every app\nbob ssh-ed25519 %s may push blog, wiki\n'
        % (dh.fingerprint(ED), dh.fingerprint(ED_2)))
    upload(plain, LINE, 'anna')
    assert capfd.readouterr().out.endswith('nothing changed\n')
    dh.list_keys(plain.host)
    assert [line.split()[::3] for line in capfd.readouterr().out.splitlines()] == [
        ['anna', '(every'], ['bob', 'blog']]
    dh.remove_key(plain.host, 'anna')
    assert dh.split_authorized_keys(plain.read(KEYS_FILE)) == (
        ["ssh-rsa AAAA admin's own"], KEYS[1:], [])

@pytest.mark.parametrize('text, words', [
    ('', ['anna']), ('garbage', ['anna']), (LINE + '\nno', ['anna']), (LINE, ['-x']),
    ('-----BEGIN OPENSSH PRIVATE KEY-----', ['anna']), (LINE, ['anna', 'Blog']),
    ('command="sh" ' + LINE, ['anna']), ('#' * 300000, ['anna']), (LINE_2, ['anna']),
    (LINE, ['a b']), (LINE, ['anna', '../x']), (LINE, ['anna'] + ['a' * 40] * 300)])
def test_an_upload_that_is_refused_changes_no_key(plain, text, words):
    plain.write(KEYS_FILE, KEYS_TEXT)
    assert refusal(upload, plain, text, *words)
    assert plain.read(KEYS_FILE) == KEYS_TEXT

def test_a_key_that_this_servers_openssh_does_not_know_is_refused(plain):
    plain.broken['ssh-keygen -l -f '] = 1
    assert 'knows no ssh-ed25519 keys' in refusal(upload, plain, LINE, 'anna')
    assert plain.read(KEYS_FILE) is None

@each('name', '.* ann Anna * annaa', '')
def test_names_of_keys_are_compared_not_matched(plain, name):
    plain.write(KEYS_FILE, KEYS_TEXT)
    assert 'no key is named "%s"' % name in refusal(dh.remove_key, plain.host, name)
    assert plain.read(KEYS_FILE) == KEYS_TEXT

@pytest.fixture
def healthy(machine, capfd):
    dh.install(machine.host)
    upload(machine, LINE, 'anna')
    machine.lives(FILES)
    capfd.readouterr()
    return machine

def test_doctor_finds_nothing_on_a_healthy_machine(healthy, capfd):
    before = healthy.whole()
    dh.doctor(healthy.host)
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
    os.symlink('releases/1', dh.app_folder(machine.host, 'blog', 'pending'))

def dead(machine):
    for each in (machine.containers, machine.jobs):
        each.clear()

@pytest.mark.parametrize('harm, what, command', [
    (says('which', ''), 'git', 'apt-get install git'),
    (edited('/etc/passwd', ''), 'there is no user git', 'dockhand.py install'),
    (edited('/etc/sudoers.d/dockhand'), 'sudoers.d/dockhand is not as', 'install'),
    (edited('/usr/local/bin/dockhand'), 'bin/dockhand is not as installed', 'install'),
    (broken('sudo -n'), 'the user git cannot run', 'visudo'),
    (says('sshd', 'AllowUsers admin\n'), 'AllowUsers of sshd is admin, without git', 'sshd'),
    (says('sshd', 'AllowUsers git2 legit\n'), 'is git2 legit, without git', 'sshd_config'),
    (says('sshd', 'allowgroups a\n'), 'AllowGroups of sshd is a, without git', 'sshd_config'),
    (says('sshd', 'authorizedkeysfile /k\n'), 'sshd is /k, without .ssh/authorized_keys',
     'sshd_config'),
    (gone(KEYS_FILE), 'no key may push', 'dockhand upload-key NAME'),
    (edited('/etc/nginx/conf.d/000-dockhand.conf'), '000-dockhand.conf', 'install'),
    (broken('nginx -t'), 'broken on purpose', 'nginx -t'),
    (gone('/run/nginx.pid'), 'nginx does not run', 'service nginx start'),
    (pending, 'a deploy of blog was interrupted', 'sudo dockhand recover'),
    (lambda m: m.images.pop('blog:1'), 'the image of blog is gone', 'rebuild blog'),
    (dead, 'blog does not run', 'sudo dockhand start blog')])
def test_doctor_says_what_is_wrong_and_what_to_type(healthy, capfd, harm, what, command):
    harm(healthy)
    assert 'thing(s) to mend' in refusal(dh.doctor, healthy.host)
    rows = re.findall('WRONG  (.*)\n +type: (.*)', capfd.readouterr().out)
    assert [row for row in rows if what in row[0] and command in row[1]]

@pytest.mark.parametrize('said', [
    'AllowUsers admin git', 'AllowGroups git wheel', 'allowusers a\nallowusers git',
    'AuthorizedKeysFile /k %h/.ssh/authorized_keys',
    'authorizedkeysfile /home/git/.ssh/authorized_keys'])
def test_doctor_finds_nothing_where_sshd_lets_git_in(healthy, capfd, said):
    healthy.sshd = lambda option: said + '\n'
    dh.doctor(healthy.host)
    assert capfd.readouterr().out == 'all is well\n'

def test_doctor_leaves_an_app_that_is_stopped_alone(healthy, capfd):
    dh.stop(healthy.host, 'blog')
    dh.doctor(healthy.host)
    assert capfd.readouterr().out.endswith('all is well\n')

def test_apps_are_listed_with_state_commit_key_and_address(healthy, capfd):
    for state in ('running', 'stopped'):
        dh.apps(healthy.host)
        row = capfd.readouterr().out.split()
        assert row[:3] == ['blog', state, '1' * 10]
        assert row[-2:] == ['anna', 'http://blog.example.org/']
        dh.stop(healthy.host, 'blog')
        capfd.readouterr()


# ---------------------------------------------------------------------------------------
# The real layer: dockhand on fresh servers, with real git, sshd, sudo, docker and nginx
# ---------------------------------------------------------------------------------------
#
# Each server is a container that `.ci/server` boots, made ready the way the README says. All
# requests go to ports at 127.0.0.1 or are made inside a server. DOCKHAND_TEST_KEEP=NAME leaves
# the servers for the next run, which uses them again with the dockhand.py of that time.

HERE = os.path.dirname(os.path.abspath(__file__))
REAL_FILES = ('dockhand.py', 'configure-system.sh', 'Vagrantfile', 'test_dockhand.py', 'README.md')
KINDS = ('systemd', 'none', 'upstart')
KEEP = os.environ.get('DOCKHAND_TEST_KEEP')

Outcome = namedtuple('Outcome', 'status out err')

def run(argv, stdin='', **options):
    """Run a command on this machine, for three minutes at most; its Outcome."""
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, **options)
    try:
        out, err = process.communicate(
            stdin if isinstance(stdin, bytes) else stdin.encode('utf-8'), timeout=180)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return Outcome(process.returncode, out.decode('utf-8', 'replace').strip(),
                   err.decode('utf-8', 'replace').strip())

def must(argv, **options):
    """Run a command that must succeed; its standard output."""
    outcome = run(argv, **options)
    assert outcome.status == 0, '%s\n%s\n%s' % (argv, outcome.out, outcome.err)
    return outcome.out

def until(ask, wanted, seconds=30, pause=0.1):
    """Ask until the answer is as wanted, for so long at most; the last answer."""
    deadline = time.time() + seconds
    while True:
        answer = ask()
        if answer == wanted or time.time() > deadline:
            return answer
        time.sleep(pause)

def together(*calls):
    """Call functions at the same time; what they return, or the first exception."""
    results = [None] * len(calls)

    def work(at):
        try:
            results[at] = (calls[at](), None)
        except BaseException as error:
            results[at] = (None, error)
            sys.stdout.write(traceback.format_exc())
    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _, error in results:
        if error:
            raise error
    return [result for result, _ in results]

def everywhere(test):
    """Run a test on every kind of server, on all at the same time."""
    def on_each(servers):
        together(*[functools.partial(test, servers[kind]) for kind in KINDS])
    on_each.__name__, on_each.__doc__ = test.__name__, test.__doc__
    return on_each

# ---------------------------------------------------------------------------------------
# Servers and apps
# ---------------------------------------------------------------------------------------

# What small apps start from, made in each server of its own static busybox.
TINY = '''
mkdir -p /root/tiny/bin && cd /root/tiny && cp "$(command -v busybox)" bin/busybox
for name in sh httpd nc wget cat echo sleep true false; do ln -sf busybox bin/$name; done
tar -c . | docker import - tiny:1
'''
MANIFEST = '''
find "$@" -printf '%p %y %m %u %g %l\\n' | sort
find "$@" -type f -print0 | sort -z | xargs -r0 sha256sum
'''
SSH_CONFIG = '''
Host hoster
    User hoster
Host other
    IdentityFile {folder}/other
Host * !other
    IdentityFile {folder}/main
Host *
    HostName 127.0.0.1
    Port {port}
    User git
    BatchMode yes
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    ControlPath {folder}/{kind}.%n
'''

class Server(object):
    """A fresh server in a container, and the keys to it."""

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        self.name = 'dockhand-test-%s-%s' % (KEEP or os.getpid(), kind)
        self.demo, self.apps, self.port = None, {}, 8100
        self.config = os.path.join(folder, kind)

    def control(self, *words):
        must(['sh', os.path.join(HERE, '.ci', 'server')] + list(words) + [self.name])

    def prepare(self):
        """Boot it and follow the README, or take what an earlier run left."""
        kept = run(['docker', 'inspect', self.name]).status == 0
        if not kept:
            self.control('boot', self.kind)
        self.ok('mkdir -p /root/dockhand')
        for name in REAL_FILES:
            if os.path.exists(os.path.join(HERE, name)):
                must(['docker', 'cp', '-L', os.path.join(HERE, name),
                      self.name + ':/root/dockhand/'])
        if kept:
            self.ok('for app in $(ls /var/lib/dockhand/apps); do dockhand destroy $app --force;'
                    ' done; /usr/bin/python3 /root/dockhand/dockhand.py install --user git')
        else:
            self.demo = self.ok('sh /root/dockhand/configure-system.sh --demo 2>&1')
        self.ok(TINY)
        self.connect()

    def remove(self):
        self.disconnect('main', 'other', 'hoster')
        if not KEEP:
            self.control('remove')

    def run(self, *argv, **options):
        return run(['docker', 'exec', '-i', self.name] + list(argv), **options)

    def ok(self, script, *args, **options):
        """Run a script that must succeed; its output."""
        outcome = self.run('sh', '-c', script, 'sh', *args, **options)
        assert outcome.status == 0, '%s\n%s\n%s' % (script, outcome.out, outcome.err)
        return outcome.out

    def dockhand(self, *words, **options):
        return self.run('dockhand', *words, **options)

    def manifest(self, *paths):
        return self.ok(MANIFEST, *paths).splitlines()

    def inside(self, app, template):
        """What docker says of an app's running container."""
        return self.ok('docker inspect -f "$1" "$2"', template, app.container())

    # ---- ssh, git, http: over one ssh connection a key, since sshd lets few begin at once

    def connect(self):
        self.outside = dict(
            (port, int(must(['docker', 'port', self.name, str(port)]).rpartition(':')[2]))
            for port in (22, 80, 2525))
        with open(self.config, 'w') as config:
            config.write(SSH_CONFIG.format(port=self.outside[22], kind=self.kind,
                                           folder=self.folder))
        for alias in ('main', 'other'):
            assert self.dockhand('upload-key', alias,
                                 stdin=public_key(self, alias)).status == 0
            self.open_connection(alias)

    def open_connection(self, alias):
        with open(os.devnull, 'r+') as null:
            assert subprocess.call(['ssh', '-F', self.config, '-M', '-N', '-f', alias],
                                   stdin=null, stdout=null, stderr=null) == 0

    def disconnect(self, *aliases):
        for alias in aliases:
            run(['ssh', '-F', self.config, '-O', 'exit', alias])

    def ssh(self, *words):
        return run(['ssh', '-F', self.config] + list(words))

    def git(self, *words, **options):
        env = dict(os.environ, GIT_SSH_COMMAND='ssh -F ' + self.config, GIT_CONFIG_NOSYSTEM='1',
                   HOME=self.folder, LC_ALL='C')
        return run(['git', '-c', 'user.name=test', '-c', 'user.email=test@localhost'] +
                   list(words), env=env, **options)

    def hear(self, port, request):
        """What comes back from one of the server's ports, or why nothing does."""
        try:
            connection = socket.create_connection(('127.0.0.1', self.outside[port]), 10)
            try:
                connection.sendall(request.encode())
                return b''.join(iter(lambda: connection.recv(65536), b'')).decode().strip()
            finally:
                connection.close()
        except (EnvironmentError, socket.error) as error:
            return str(error)

    def get(self, name):
        """What nginx answers to that Host: the body, or the status where it is not 200."""
        answer = self.hear(80, 'GET / HTTP/1.0\r\nHost: %s\r\n\r\n' % name)
        head, _, body = answer.partition('\r\n\r\n')
        return body if ' 200 ' in head[:15] else head[9:12]

    # ---- what happens to servers

    def reboot(self, *commands):
        self.disconnect('main', 'other')
        for words in commands or (('restart', '-t', '60'),):
            must(['docker'] + list(words) + [self.name])
        self.control('up', self.kind)
        self.connect()

    def cut_power(self):
        self.reboot(('kill',), ('start',))

    def restart_docker(self):
        self.ok({'systemd': 'systemctl restart docker', 'upstart': 'restart docker',
                 'none': 'kill $(cat /run/docker.pid); while [ -e /run/docker.pid ]; do '
                         'sleep 0.1; done; setsid dockerd >>/var/log/dockerd.log 2>&1 &'
                 }[self.kind])
        assert until(lambda: self.run('docker', 'ps').status, 0) == 0

    # ---- apps that tests share

    def app(self, name, **changes):
        """A web app that has been pushed and answers, made at the first call."""
        if name not in self.apps:
            self.port += 1
            app = App(self, name, self.port)
            app.deploy(dict(web_files(name, self.port), **changes))
            self.apps[name] = app
        self.apps[name].follow()
        return self.apps[name]

    def apache(self):
        """The example of 2014, its base image made offline under the name it starts from."""
        if 'apache-example' not in self.apps:
            tar = must(['sh', os.path.join(HERE, '.ci', 'server'), 'apache'])
            with open(tar, 'rb') as source:
                assert self.run('docker', 'import', '-', 'ubuntu:12.04',
                                stdin=source.read()).status == 0
            app = self.apps['apache-example'] = App(self, 'apache-example')
            app.first_push = app.deploy(APACHE)
        return self.apps['apache-example']

class App(object):
    """A repository on this machine, and the app of that name on a server."""

    def __init__(self, server, name, port=None, alias='main'):
        self.server, self.name, self.port = server, name, port
        self.remote = '%s:%s.git' % (alias, name)
        self.folder = tempfile.mkdtemp(dir=server.folder)
        self.git('init', '-q')
        self.git('symbolic-ref', 'HEAD', 'refs/heads/main')

    def git(self, *words):
        outcome = self.server.git(*words, cwd=self.folder)
        assert outcome.status == 0, '%s\n%s' % (words, outcome.err)
        return outcome.out

    def write(self, name, text):
        """Make a file of text, a link of a one-word tuple, nothing of None."""
        path = os.path.join(self.folder, name)
        folder = os.path.dirname(path)
        for old in (folder, path):
            if os.path.islink(old) or os.path.isfile(old):
                os.unlink(old)
        if not os.path.isdir(folder):
            os.makedirs(folder)
        if isinstance(text, tuple):
            os.symlink(text[0], path)
        elif text is not None:
            with open(path, 'wb') as file:
                file.write(text if isinstance(text, bytes) else text.encode('utf-8'))

    def commit(self, files):
        """Write {name: text} and commit; the commit."""
        for name in files:
            self.write(name, files[name])
        self.git('add', '-A')
        self.git('commit', '-q', '--allow-empty', '-m', 'a change')
        return self.git('rev-parse', 'HEAD')

    def push(self, *words):
        """git push; the Outcome, in `out` what dockhand said, line by line."""
        outcome = self.server.git('push', self.remote, *(words or ('main',)), cwd=self.folder)
        said = re.findall(r'(?m)^remote: (.*?) *$', outcome.err)
        return outcome._replace(out=[
            line for line in said if not line.startswith('error: hook declined')])

    def hear(self, pattern, options=''):
        """Begin a push until it says this: its process, in a group of its own, and the text."""
        env = dict(os.environ, LC_ALL='C',
                   GIT_SSH_COMMAND='ssh -F %s %s' % (self.server.config, options))
        process = subprocess.Popen(['git', 'push', self.remote, 'main'], cwd=self.folder,
                                   env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   bufsize=0, preexec_fn=os.setpgrp)
        heard, deadline = b'', time.time() + 60
        while not re.search(pattern.encode(), heard):
            readable = select.select([process.stdout], [], [], max(0, deadline - time.time()))[0]
            data = readable and process.stdout.read(65536)
            if not data:
                os.killpg(process.pid, signal.SIGKILL)
                raise AssertionError('%s was not said: %s' % (pattern, heard))
            heard += data
        return process, heard

    def deploy(self, files):
        """Commit, push and see it accepted; the push's Outcome."""
        commit = self.commit(files)
        pushed = self.push()
        assert pushed.status == 0, pushed.err
        assert self.branch() == commit
        return pushed

    def change(self, text):
        """Push another text and see it answered."""
        self.deploy({'www/index.html': text})
        assert self.answer() == text

    def follow(self):
        """Take what is on the server, and drop all else."""
        self.git('fetch', '-q', self.remote, 'main')
        self.git('reset', '-q', '--hard', 'FETCH_HEAD')
        self.git('clean', '-q', '-f', '-d')

    def branch(self, name='main'):
        """Where the branch of the server is, '' where it has none."""
        return self.server.git('ls-remote', self.remote, 'refs/heads/' + name).out[:40]

    def answer(self):
        return self.server.get(self.name + '.test')

    def container(self):
        """The running container of what is live."""
        return self.server.ok('docker ps -q --no-trunc --filter ancestor=%s:latest' % self.name)

REAL_WEB = 'FROM tiny:1\nCOPY www /www\n'

def web_files(name, port, options='--rm --init', command='exec httpd -f -h /www'):
    """A web app of a few bytes; its index.html holds its name at first."""
    return {
        'Dockerfile': REAL_WEB + 'CMD ["sh", "-c", "%s"]\n' % command,
        'www/index.html': name + '\n',
        'upstart.conf': 'start on started docker\nstop on stopping docker\nrespawn\n'
                        'exec docker run %s -p 127.0.0.1:%d:80 %s\n' % (options, port, name),
        'nginx-proxy.conf': 'server {\n    listen 80;\n    server_name %s.test;\n'
                            '    location / { proxy_pass http://127.0.0.1:%d; }\n}\n'
                            % (name, port)}

# The example that people know from 2014, with what today's apache wants of it.
APACHE = {
    'Dockerfile': 'FROM ubuntu:12.04\n'
                  'ENV APACHE_RUN_DIR=/var/run/apache2 APACHE_RUN_USER=www-data '
                  'APACHE_RUN_GROUP=www-data APACHE_LOG_DIR=/var/log/apache2 '
                  'APACHE_PID_FILE=/var/run/apache2/apache2.pid\n'
                  'RUN mkdir -p /var/run/apache2 && '
                  'echo ServerName localhost >>/etc/apache2/apache2.conf\n'
                  'ADD www /var/www/html\nEXPOSE 80\n'
                  'CMD ["/usr/sbin/apache2", "-D", "FOREGROUND"]\n',
    'www/index.html': 'It works\n',
    'upstart.conf': 'description "apache"\nstart on filesystem and started docker\n'
                    'stop on runlevel [!2345]\nrespawn\nkill signal SIGINT\n'
                    'exec docker run -rm -p 127.0.0.1:8000:80 apache-example\n',
    'nginx-proxy.conf': 'server {\n    listen 80 default_server;\n'
                        '    location / { proxy_pass http://127.0.0.1:8000; }\n}\n'}

@pytest.fixture(scope='session')
def servers():
    """{kind: Server}, made ready at the same time."""
    missing = [name for name in ('docker', 'git', 'ssh', 'ssh-keygen')
               if not any(os.access(os.path.join(folder, name), os.X_OK)
                          for folder in os.environ['PATH'].split(':'))]
    reason = ('no ' + ', '.join(missing) if missing else 'root only' if os.geteuid()
              else 'no docker engine answers: .ci/server engine' if run(['docker', 'ps']).status
              else '')
    if reason:
        (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)(reason)
    folder = tempfile.mkdtemp(prefix='dockhand-')
    made = [Server(kind, folder) for kind in KINDS]
    try:
        for key in ('main', 'other', 'fresh'):
            must(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f',
                  os.path.join(folder, key)])
        must(['sh', os.path.join(HERE, '.ci', 'server'), 'images'])
        together(*[server.prepare for server in made])
        yield dict((server.kind, server) for server in made)
    finally:
        together(*[server.remove for server in made])
        shutil.rmtree(folder)

def public_key(server, key):
    with open(os.path.join(server.folder, key + '.pub')) as file:
        return file.read()

# ---------------------------------------------------------------------------------------
# From nothing to an answer
# ---------------------------------------------------------------------------------------

@everywhere
def test_real_one_command_makes_a_fresh_server_deploy(server):
    if server.demo is None:
        pytest.skip('the servers were kept')
    assert re.findall(r'(?m)^Hello .*', server.demo) == [
        'Hello from a container', 'Hello again', 'Hello again']
    assert 'remote: dockhand: the build failed' in server.demo

@everywhere
def test_real_a_second_run_changes_nothing(server):
    def look():
        pids = server.ok('cat /run/docker.pid /run/nginx.pid /run/sshd.pid; '
                         'pidof avahi-daemon || :')
        return pids, server.manifest('/etc', '/usr/local', '/var/lib/dockhand', '/home/git')
    before = look()
    said = server.ok('sh /root/dockhand/configure-system.sh')
    assert 'nothing changed' in said and 'this system was ready' in said
    assert look() == before
    assert server.ok('dockhand doctor') == 'all is well'

# ---------------------------------------------------------------------------------------
# Pushes
# ---------------------------------------------------------------------------------------

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

@everywhere
def test_real_a_clone_and_a_fetch_get_what_was_pushed(server):
    app, copy = server.app('shop'), App(server, 'shop')
    copy.follow()
    assert copy.git('rev-parse', 'HEAD') == app.branch()
    copy.git('clone', '-q', copy.remote, 'clone')
    assert sorted(os.listdir(copy.folder + '/clone')) == sorted(os.listdir(app.folder))

@everywhere
def test_real_a_push_from_a_shallow_clone_deploys(server):
    server.app('shop').change('before the clone')
    shallow = App(server, 'shop')
    shallow.git('fetch', '-q', '--depth', '1', shallow.remote, 'main')
    shallow.git('reset', '-q', '--hard', 'FETCH_HEAD')
    assert shallow.git('rev-list', '--count', 'HEAD') == '1'
    shallow.change('from a shallow clone')

def look_at(server, app):
    """All that a push changes."""
    return (app.answer(), app.branch(), server.ok('dockhand apps'), server.ok('docker ps -q'),
            server.ok('docker images -q --no-trunc | sort -u'),
            server.manifest('/etc/nginx', '/var/lib/dockhand'))

@everywhere
def test_real_a_tag_is_stored_and_deploys_nothing(server):
    app = server.app('shop')
    before = look_at(server, app)
    app.git('tag', '-f', 'v1')
    pushed = app.push('v1')
    assert pushed.status == 0, pushed.err
    assert look_at(server, app) == before
    assert server.git('ls-remote', app.remote, 'v1').out

@everywhere
def test_real_a_plan_shows_the_difference_and_changes_nothing(server):
    app = server.app('shop')
    before = look_at(server, app)
    app.commit({'nginx-proxy.conf': web_files('shop', app.port)['nginx-proxy.conf'].replace(
        'listen 80;', 'listen 80;\n    gzip on;')})
    pushed = app.push('main:plan')
    check_refusal(pushed, 'this was a plan')
    assert any('+    gzip on;' in line for line in pushed.out), pushed.err
    assert look_at(server, app) == before
    assert app.branch('plan') == ''

@everywhere
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
    refused(app, {'Dockerfile': REAL_WEB + check % 2 + 'CMD ["httpd", "-f", "-h", "/www"]\n'},
            'HEALTHCHECK says unhealthy', 1)

@everywhere
def test_real_line_ends_of_windows_are_no_mistake(server):
    app = App(server, 'crlf', 8095)
    app.deploy(dict((name, text.replace('\n', '\r\n'))
                    for name, text in web_files('crlf', 8095).items()))
    assert app.answer() == 'crlf'

# ---------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------

def check_refusal(pushed, pattern):
    """One line of dockhand's, the last one, says why."""
    assert pushed.status != 0, pushed.err
    said = [line for line in pushed.out if line.startswith('dockhand: ')]
    assert len(said) == 1 and pushed.out[-1] == said[0], pushed.err
    assert re.search(pattern, said[0]), pushed.err

def refused(app, files, pattern, times=2):
    """A push is refused, the old version answers, and the same push again does the same."""
    before = app.answer(), app.branch()
    app.commit(files)
    for _ in range(times):
        pushed = app.push()
        check_refusal(pushed, pattern)
        assert (app.answer(), app.branch()) == before
    app.follow()
    return pushed

@everywhere
def test_real_a_dockerfile_that_fails_is_refused(server):
    refused(server.app('shop'), {'Dockerfile': 'FROM tiny:1\nRUN false\n'}, 'build failed')

@everywhere
def test_real_a_job_that_dies_at_once_is_refused_and_its_log_shown(server):
    pushed = refused(server.app('shop'), {
        'Dockerfile': 'FROM tiny:1\nCMD ["sh", "-c", "echo no database; exit 3"]\n'},
        'failed its health check')
    assert any('no database' in line for line in pushed.out), pushed.err

def test_real_an_app_that_never_listens_is_refused_after_a_minute(servers):
    begun = time.time()
    refused(servers['upstart'].app('shop'),
            {'Dockerfile': 'FROM tiny:1\nCMD ["sleep", "9999"]\n'}, 'nothing listens on port 80',
            1)
    assert 60 <= time.time() - begun < 90

@everywhere
def test_real_a_proxy_file_that_breaks_or_takes_something_is_refused(server):
    server.apache()
    server.app('basket', **{'nginx-proxy.conf': 'server { listen 80; server_name basket.test '
                            'b.shop.test; return 200 basket; }\n'})
    for text, pattern in (
            ('server {', r'nginx-proxy\.conf:\d+: '),
            ('server { listen 80; server_name a.test; bogus on; }', r'conf:1: .*bogus'),
            ('server { listen 80 default_server; }', 'taken .*apache-example.conf'),
            ('server { listen 80; server_name a.test b.shop.test; }',
             r'b\.shop\.test.* taken .*basket\.conf'),
            ('server { listen 80; }', r'conf:1: no request reaches')):
        refused(server.app('shop'), {'nginx-proxy.conf': text + '\n'}, pattern)

@everywhere
def test_real_a_proxy_file_that_was_edited_on_the_server_is_not_overwritten(server):
    app, path = server.app('shop'), '/etc/nginx/conf.d/shop.conf'
    server.ok("sed -i 's/listen 80;/listen 80; gzip on;/' " + path)
    edited = server.ok('cat ' + path)
    refused(app, {'nginx-proxy.conf': web_files('shop', app.port)['nginx-proxy.conf'] + '\n'},
            'to keep that, commit it in nginx-proxy.conf.* sudo rm ' + path)
    assert server.ok('cat ' + path) == edited
    server.ok('rm ' + path)
    app.change('after the edit')

@everywhere
def test_real_a_name_that_the_server_has_already_is_refused(server):
    app = App(server, 'legacy')
    app.commit(web_files('legacy', 8092))
    for make, unmake, pattern in (
            ('echo "# mine" >/etc/nginx/conf.d/legacy.conf', 'rm /etc/nginx/conf.d/legacy.conf',
             'conf.d/legacy.conf'),
            ('mkdir -p /etc/init; echo exec sleep 9 >/etc/init/legacy.conf',
             'rm /etc/init/legacy.conf; rmdir /etc/init || :', '/etc/init/legacy.conf'),
            ('echo >/etc/init.d/legacy', 'rm /etc/init.d/legacy', 'a service of this server'),
            ('docker tag tiny:1 legacy:latest', 'docker rmi legacy:latest', 'legacy:latest'),
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

# ---------------------------------------------------------------------------------------
# Whatever else happens
# ---------------------------------------------------------------------------------------

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
    server.ok('kill -9 ' + re.search(r'process (\d+)', server.ok('status survivor')).group(1))
    assert until(app.answer, 'survivor') == 'survivor'
    app.change('survived')
    app.change('survivor')
    assert 'start/running' in server.ok('status survivor')
    assert len(app.container().split()) == 1

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
    states = dict(line.split()[:2] for line in server.ok('dockhand apps').splitlines())
    assert states.pop('quiet') == 'stopped'
    assert set(states.values()) == set(['running']), states
    quiet.change(event.__name__)

@everywhere
def test_real_apps_come_back_after_a_reboot(server):
    come_back_after(server, server.reboot)

@everywhere
def test_real_apps_come_back_after_a_power_cut(server):
    come_back_after(server, server.cut_power)

def test_real_one_of_two_pushes_at_once_is_accepted(servers):
    server = servers['none']
    first, second = server.app('race'), App(server, 'race')
    for turn in range(10):
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
            check_refusal(app.push(), 'docker does not answer|annot connect to the Docker')
    finally:
        server.ok('systemctl start docker.socket docker')
    server.app('shop').change('docker is back')

@everywhere
def test_real_a_configuration_of_nginx_that_was_broken_already_is_named(server):
    app = server.app('shop')
    server.ok('echo "bogus on;" >/etc/nginx/conf.d/elses.conf')
    try:
        refused(app, {'www/index.html': 'never'},
                r"configuration was broken before this push.*bogus.*/elses\.conf:1")
    finally:
        server.ok('rm /etc/nginx/conf.d/elses.conf')

@everywhere
def test_real_nginx_is_started_by_a_push_where_it_does_not_run(server):
    app = server.app('shop')
    server.ok({'systemd': 'systemctl stop nginx', 'upstart': 'stop nginx',
               'none': 'nginx -s quit; while [ -e /run/nginx.pid ]; do sleep 0.1; done'
               }[server.kind])
    app.deploy({'www/index.html': 'nginx is back', 'nginx-proxy.conf': web_files(
        'shop', app.port)['nginx-proxy.conf'] + '# %s\n' % time.time()})
    assert app.answer() == 'nginx is back'

# ---------------------------------------------------------------------------------------
# What will be tried: each ends in one line and changes nothing
# ---------------------------------------------------------------------------------------

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

NAMES = ['', '.', '..', '.ssh', '../../tmp/x', 'a/b', 'my app', 'Upper', 'a..b', 'a-', '-a', 'a',
         'a:b', '$(touch /tmp/x)', '*', 'a' * 256, u'\u202eshop', '\x1b[31mred', u'sh\u043ep',
         'ssh', 'docker', 'nginx', 'default', 'networking', 'ubuntu', 'python', 'shop\n', '/',
         'shop.git.git', '.git', "shop';id;'", '--help']
SSH_COMMANDS = [
    'id', 'bash -i', "git-receive-pack 'a';id", "git-receive-pack 'a' 'b'", 'serve main',
    'git-receive-pack --help', "git-upload-pack --timeout=1 'shop'", "git-receive-pack 'shop'\n",
    "git-receive-pack 'shop' " + 'x' * 10240, "git-upload-archive 'shop'", 'destroy ..',
    'logs /', 'dockhand destroy shop --force', 'sudo -n id', 'git-receive-pack shop',
    "git-receive-pack 'shop' ", "GIT-RECEIVE-PACK 'shop'", 'scp -t /tmp']

def test_real_ssh_gives_nothing_but_git(untouched):
    for command in SSH_COMMANDS + ["git-%s-pack '%s'" % (verb, name) for name in NAMES
                                   for verb in ('receive', 'upload')]:
        check_one_line(untouched.ssh('main', command))
    check_one_line(untouched.ssh('main'))
    assert untouched.run('ls', '/tmp/x').status != 0
    for words in (('-tt', 'main', 'id'), ('-W', '127.0.0.1:80', 'main')):
        outcome = untouched.ssh('-o', 'ControlPath=none', *words)
        assert outcome.status != 0 and 'uid=' not in outcome.out

def test_real_an_upload_that_is_not_all_public_keys_changes_nothing(untouched):
    good, known = public_key(untouched, 'fresh'), public_key(untouched, 'main')
    with open(os.path.join(untouched.folder, 'fresh')) as file:
        private = file.read()
    for text, pattern in (
            ('', 'no key came in'), ('\n\n', 'no key came in'), ('garbage\n', 'no public key'),
            (private, 'this is a private key'), (good + private, 'this is a private key'),
            ('command="/bin/sh" ' + good, 'no public key'), (good + 'garbage\n', 'no public key'),
            (good.replace('AAAA', 'AAAB'), 'no public key'), (good[:50], '.'),
            (known, 'known as "main"'), ('x' * (1 << 20), 'larger than'),
            (good.replace(' ', '\x00', 1), 'no public key'), (good + '\x1b[31m' + good, '.'),
            ('ssh-ed25519\n' + good.split()[1], 'no public key')):
        outcome = untouched.dockhand('upload-key', 'fresh', stdin=text)
        check_one_line(outcome)
        assert re.search(pattern, outcome.err), outcome
    for name in ('', '-x', 'a b', 'a"b', "a'b", 'a;b', 'a\nb', '../x', 'a' * 65, u'\u043e',
                 '$(id)', 'x\x1b'):
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

REAL_JOB = web_files('shop', 8094)['upstart.conf']
REAL_PROXY = 'server { listen 80; server_name shop.test; return 200 bad; }\n'
REAL_THREE = ('Dockerfile', 'upstart.conf', 'nginx-proxy.conf')
FILES_REFUSED = [
    (name, ('/etc/shadow',), name + ' is a link') for name in REAL_THREE + ('.dockerignore',)] + [
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
    ('upstart.conf', 'script\n  docker run shop\n', 'upstart.conf:1: .*without `end script`'),
    ('upstart.conf', 'respwan\n' + REAL_JOB, 'upstart.conf:1: unknown stanza `respwan`'),
    ('upstart.conf', REAL_JOB.replace('--rm', '-d'), 'upstart.conf:4: `-d`'),
    ('upstart.conf', REAL_JOB.replace('--rm', '-i -t'), 'upstart.conf:4: `-[it]`'),
    ('upstart.conf', REAL_JOB.replace('--rm', '--name x1'), 'upstart.conf:4: `--name`: without'),
    ('upstart.conf', REAL_JOB.replace('--rm', '--rm --name x'), 'upstart.conf:4: .*two characters'),
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

# ---------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------

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
    assert re.match(r'shop +running +%s +\d{4}-\d\d-\d\d \d\d:\d\d +main +http://shop\.test/$'
                    % app.branch()[:10], line)

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
    failed = server.dockhand('rebuild', 'shop', '--pull')       # there is no registry here
    assert failed.status == 1 and 'dockhand: the build failed' in failed.err
    assert app.answer() == answer

# What is broken, what doctor says, and what mends it where that is not what doctor says.
AILMENTS = [
    ('mv /usr/bin/git /usr/bin/git.off', 'git', 'mv /usr/bin/git.off /usr/bin/git'),
    ('systemctl stop docker.socket docker', 'docker does not answer', None),
    ('echo x >>/usr/local/lib/dockhand/receive', 'lib/dockhand/receive is not as inst', None),
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
    ('echo "bogus on;" >/etc/nginx/conf.d/x.conf', 'unknown directive "bogus".*x.conf:1',
     'rm /etc/nginx/conf.d/x.conf'),
    ('systemctl stop nginx', 'nginx does not run', 'systemctl start nginx'),
    ('echo >>/etc/nginx/conf.d/000-dockhand.conf', '000-dockhand.conf is not as it should', None),
    ('docker stop $(docker ps -q --filter ancestor=shop:latest)', 'shop does not run', None),
    ('docker rmi -f $(docker images --format "{{.Repository}}:{{.Tag}}" shop)',
     'the image of shop is gone', None),
    ('cd /var/lib/dockhand/apps/shop && ln -s $(readlink live) pending', 'a deploy of shop was inte',
     None)]

@pytest.mark.parametrize('harm, pattern, cure', AILMENTS, ids=[row[1][:25] for row in AILMENTS])
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

@pytest.mark.parametrize('command', [
    'vagrant validate -p', 'shellcheck configure-system.sh .ci/run .ci/server'])
def test_real_what_other_tools_read_is_valid_to_them(command, tmpdir):
    words = command.split()
    if not any(os.access(os.path.join(folder, words[0]), os.X_OK)
               for folder in os.environ['PATH'].split(':')):
        (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)('no ' + words[0])
    env = dict(os.environ, VAGRANT_DOTFILE_PATH=str(tmpdir), VAGRANT_HOME=str(tmpdir))
    assert run(words, cwd=HERE, env=env).status == 0

# ---------------------------------------------------------------------------------------
# Drills: put back, rolled back, never half
# ---------------------------------------------------------------------------------------
#
# Each prints its figures (`-rP` shows them). They run short; `-m whole` runs those whole that
# have a second size. Those of one server run one after another, beside those of the others.

with warnings.catch_warnings():                 # no file here could make the mark known
    warnings.simplefilter('ignore')
    WHOLE = [pytest.mark.whole, pytest.mark.skipif('not config.option.markexpr',
                                                   reason='long; it runs under -m whole')]
SEED = int(os.environ.get('DOCKHAND_TEST_SEED') or time.time())

def drill(kind, short=0, whole=0):
    """Make a test of a function of (server, size), which returns its figures."""
    def as_test(work):
        @pytest.mark.parametrize('size', [pytest.param(short, id='short')] + (
            [pytest.param(whole, id='whole', marks=WHOLE)] if whole else []))
        def on_one(drilled, size):
            seconds, figures, error = drilled[work, size]
            print('%.0f s, seed %d: %s' % (seconds, SEED, figures))
            if error:
                raise error
        on_one.__name__, on_one.__doc__, on_one.drill = work.__name__, work.__doc__, (kind, work)
        return on_one
    return as_test

@pytest.fixture(scope='session')
def drilled(servers, request):
    """{(drill, size): (seconds, figures, error or None)} of all that were asked for."""
    whole, came_to = request.config.option.markexpr, {}

    def on_one(kind):
        for item in request.session.items:
            asked, work = getattr(item.function, 'drill', (None, None))
            if asked == kind and (whole or not item.get_closest_marker('whole')):
                begun, figures, error = time.time(), None, None
                size = item.callspec.params['size']
                try:
                    figures = work(servers[kind], size)
                except BaseException as caught:
                    error = caught
                came_to[work, size] = time.time() - begun, figures, error
    together(*[functools.partial(on_one, kind) for kind in KINDS])
    return came_to

class Marked(App):
    """A web app whose image, job and proxy file each say of which release they are."""

    # it takes a second to stop, and goes on answering meanwhile
    COMMAND = ("echo $(cat /www/mark) $JOB >/www/index.html; trap 'sleep 1; exit' TERM; "
               "httpd -f -h /www & wait")

    def files(self, mark, slow=''):
        files = web_files(self.name, self.port, '--rm --init -e JOB=' + mark, self.COMMAND)
        proxy = files['nginx-proxy.conf'].replace(
            'location', 'add_header X-Release %s always;\n    location' % mark)
        return dict(files, **{'nginx-proxy.conf': proxy, 'www/mark': self.name + ' ' + mark,
                              'Dockerfile': files['Dockerfile'].replace('CMD', slow + 'CMD')})

    def release(self, mark):
        """Push a release and see it answer."""
        self.deploy(self.files(mark))
        self.check_whole(mark)

    def mark(self):
        """The release that answers, '' where none does, the answer where it is not whole."""
        answer = self.server.hear(80, 'GET / HTTP/1.0\r\nHost: %s.test\r\n\r\n' % self.name)
        head, _, body = answer.partition('\r\n\r\n')
        if not body or re.match(r'HTTP/1.1 50[234] ', head):
            return ''
        mark = (re.findall(r'X-Release: (\w+)', head) or ['none'])[0]
        return mark if body == '%s %s %s' % (self.name, mark, mark) else answer

    def check_whole(self, *marks):
        """One of these releases answers, nothing else is left of others; the one that does."""
        until(lambda: self.mark() in marks, True, 60)
        assert self.mark() in marks
        self.server.ok('nginx -t -q && ! ls /var/lib/dockhand/apps/%s/pending' % self.name)
        assert len(self.container().split()) == 1       # of the image APP:latest
        return self.mark()

class Watch(object):
    """Constant requests to apps, and `nginx -t` five times a second, inside a `with`."""

    LOOP = ('touch /root/watch; while [ -e /root/watch ]; do '
            'nginx -t -q 2>&1 && echo valid; sleep 0.1; done >>/root/tests')

    def __init__(self, server, *apps):
        self.server, self.going = server, True
        self.heard = dict((app.name, []) for app in apps)
        self.threads = [threading.Thread(target=self.ask, args=(app,)) for app in apps]

    def ask(self, app):
        while self.going:
            self.heard[app.name].append(app.mark())
            time.sleep(0.01)

    def test_nginx(self):
        must(['docker', 'exec', '-d', self.server.name, 'sh', '-c', self.LOOP])

    def __enter__(self):
        self.server.ok('rm -f /root/tests')
        self.test_nginx()
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self.going = False
        self.server.run('rm', '-f', '/root/watch')
        for thread in self.threads:
            thread.join()

    def figures(self):
        """What was heard, in words; nothing but whole answers of the app that was asked."""
        tests = self.server.ok('cat /root/tests').splitlines()
        wrong = [mark for marks in self.heard.values() for mark in marks
                 if not re.match(r'\w*\Z', mark)]
        assert not wrong and set(tests) == set(['valid']), (wrong, set(tests))
        return '; '.join(['%s answered %d times, %d times not' % (
            name, len(marks) - marks.count(''), marks.count(''))
            for name, marks in sorted(self.heard.items())] + [
                'nginx -t passed %d times' % len(tests)])

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
    """An app to be deployed while things happen, a neighbour, the seconds that a push takes."""
    if 'drilled' not in server.apps:
        app, neighbour = Marked(server, 'drilled', 8501), Marked(server, 'neighbour', 8502)
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
            assert app.push().status == 0       # accepted at once, where git missed it
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
        assert recovered.status == 0, recovered
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
    """The first comes at the worst moment: docker would keep the port of what it starts."""
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

def refused_after(app, pattern, harm, reason):
    """Push, do harm as soon as the push says this, and see it refused for the reason."""
    branch = app.branch()
    process, heard = app.hear(pattern)
    app.server.ok(harm)
    err = (heard + process.communicate(timeout=120)[0]).decode('utf-8', 'replace')
    said = re.findall(r'(?m)^remote: (dockhand: .*?) *$', err)
    assert process.returncode and re.search(reason, said[-1]), err
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
FILL = 'cat /dev/zero >/var/lib/docker/full || :'

@drill('systemd')
def test_real_a_disk_that_fills_up_refuses_a_push_until_there_is_room(server, size):
    server.ok(SMALL_DISK + TINY)
    try:
        app, said = Marked(server, 'cramped', 8503), []
        app.release('a')
        app.commit(app.files('b', slow='RUN sleep 2 && echo\n'))
        for moment in ('RUN sleep', 'Switching'):
            said.append(refused_after(app, moment, FILL, 'no space left'))
            assert app.mark() == 'a' or moment == 'Switching'       # docker can start nothing
            server.ok('rm /var/lib/docker/full && dockhand recover')
            assert app.mark() == 'a'
        server.ok('fallocate -l 250M /var/lib/docker/full')
        pushed = app.push()
        check_refusal(pushed, r'\d\d\d MB are free')
        assert 'Building' not in pushed.err and app.mark() == 'a'
        server.ok('rm /var/lib/docker/full')
        assert app.push().status == 0 and app.mark() == 'b'
        return ' / '.join(said + pushed.out[-1:])
    finally:
        server.run('sh', '-c', 'rm -f /var/lib/docker/full; dockhand destroy cramped --force')
        server.ok(LARGE_DISK)

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
    patterns = ['shop: release .* by main is live', 'shop.* refused: the build failed',
                'shop: rolled back', 'key fresh: may push', 'key fresh: removed']
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
    figures = 'docker + dockhand + git: %s KB before, %s then, %s at the end, %.3f of that' % (
        ' + '.join(base), ' + '.join(used[first]), ' + '.join(used[size]), now / float(then))
    assert now <= 1.05 * then, figures
    listed = server.ok('dockhand releases disk').splitlines()
    assert [line.split()[0] for line in listed] == [str(size - at) for at in range(5)], listed
    assert len(server.ok('docker images -q disk').splitlines()) == 6    # with disk:latest
    server.ok('docker inspect ' + ' '.join(foreign))
    return figures

@drill('none')
def test_real_what_was_pruned_is_made_again(server, size):
    app = server.app('survivor')
    app.change('kept'), app.change('survivor')
    server.ok('docker rm -f $1 && dockhand recover', app.container())
    assert app.answer() == 'survivor'
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
    number = int(re.search(r'(\d+) .* live', server.ok('dockhand releases shop')).group(1)) - 1
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
    ('RUN sleep', BREAK_NGINX, 'rm ' + OTHER_FILE, 'bogus.*/elses.conf:1', True),
    ('RUN sleep', 'stop nginx; ' + BREAK_NGINX, 'rm ' + OTHER_FILE,
     'bogus.*/elses.conf:1', False)]

@drill('upstart')
def test_real_what_breaks_in_mid_deploy_is_named_and_mended_by_the_same_push(server, size):
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
find /run/lock/dockhand -type f | while read lock; do flock -n $lock true || echo $lock; done'''
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
    apps = [Marked(server, 'many%d' % number, 8530 + number, ('main', 'other')[number % 2])
            for number in range(size)]
    for app in apps:
        app.commit(app.files('m'))
    for app in apps[3::4]:
        app.commit({'nginx-proxy.conf': 'server { listen 80; server_name a.test; bogus on; }\n'})
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
                       r'\d+\.\d s, checked in \d+\.\d s, down for \d+\.\d s', said).group(1)
    assert re.search(r'       disk: \d+\.\d MB (?:more|less)', said), said
    assert re.search(r"-> shop answers 200: curl -H 'Host: shop\.test' http://[\d.]+/", said), said
    refused(app, {'Dockerfile': 'FROM tiny:1\nRUN false\n'}, 'build failed', 1)
    listed, when = server.ok('dockhand releases shop').splitlines(), r'[\d-]{10} \d\d:\d\d'
    assert re.match(r' *%d  [0-9a-f]{10}  %s  main +-  failed: the build failed'
                    % (int(number) + 1, when), listed[0]), listed
    assert re.match(r' *%s  %s  %s  main +\d+\.\d s  live$'
                    % (number, app.branch()[:10], when), listed[1]), listed
    check_one_line(server.dockhand('releases', 'nobody'))
    return '\n'.join(listed)

@drill('none')
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
