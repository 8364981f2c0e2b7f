#!/usr/bin/env python3
"""dockhand: git push deploys anything that fits in a container, on your own server.

One file, copied to the server, is the installer, the key uploader and the handler of
every push. It calls git, docker, nginx and init, and writes their own plain files: no
daemon, no database. Take it away and every app goes on running and comes back at boot.

    python3 dockhand.py install          make this machine ready (safe to repeat)
    dockhand upload-key NAME < id.pub    who may push; also `gitreceive upload-key NAME`
    git push git@HOST:APP.git main       deploy: build, check, switch, or change nothing

A repository holds a Dockerfile, an upstart.conf and, for a web app, an nginx-proxy.conf.
`dockhand` alone lists the commands that people run. sshd runs `dockhand serve KEY`; the
repositories' hooks run `sudo receive update ...` and `sudo receive post-receive ...`.

What it writes:
    /usr/local/lib/dockhand, /usr/local/bin/dockhand (and gitreceive, a link to it)
    /etc/sudoers.d/dockhand, a boot job, /etc/nginx/conf.d/000-dockhand.conf
    /home/git: the repositories and .ssh/authorized_keys
    /var/lib/dockhand: the releases of each app
    for each app: /etc/init/APP.conf or a container, /etc/nginx/conf.d/APP.conf, an image

Copyright the dockhand authors. MIT licence: do as you like, keep this line, no warranty.
"""
import errno
import fcntl
import os
import re
import select
import signal
import stat
import sys
import time
from collections import deque, namedtuple
from contextlib import contextmanager
from functools import partial
from itertools import takewhile

# ---- Python 2.7 and 3 ------------------------------------------------------------------

PYTHON_2 = sys.version_info[0] == 2
monotonic = time.time if PYTHON_2 else time.monotonic

def to_text(data):
    """Bytes from a disk or a pipe as the native str."""
    return data if PYTHON_2 else data.decode('utf-8', 'surrogateescape')

def to_bytes(text):
    """The native str (or 2.7's unicode) as bytes for a disk or a pipe."""
    if isinstance(text, bytes):
        return text
    return text.encode('utf-8', 'strict' if PYTHON_2 else 'surrogateescape')

# ---- Constants: paths, limits, templates -----------------------------------------------

LIBRARY = '/usr/local/lib/dockhand'
PROGRAM, OLDER_NAME = '/usr/local/bin/dockhand', '/usr/local/bin/gitreceive'
RECEIVE, TEMPLATE = LIBRARY + '/receive', LIBRARY + '/template'
STATE, LOCKS = '/var/lib/dockhand', '/run/lock/dockhand'
JOBS, JOB_LOGS = '/etc/init', '/var/log/upstart'
NGINX, PROXIES = '/etc/nginx', '/etc/nginx/conf.d'
CATCH_ALL, SUDOERS = PROXIES + '/000-dockhand.conf', '/etc/sudoers.d/dockhand'
INSTALL_AGAIN = 'sudo %s %s/dockhand.py install' % (sys.executable, LIBRARY)
UNITS = ('/etc/systemd/system', '/lib/systemd/system', '/usr/lib/systemd/system')
BOOT_JOB, UNIT = JOBS + '/dockhand-recover.conf', UNITS[0] + '/dockhand-recover.service'

FILE_LIMIT = 256 * 1024         # bytes of a Dockerfile, a job, a proxy file
PATIENCE = 5.0                  # seconds in all that a pusher may keep us waiting
HEALTH_TIMEOUT, STEADY = 60, 2.0    # seconds for an app to answer, and to keep running
RELOAD_TIMEOUT = 10             # seconds for nginx to take up its configuration
LOG_LINES = 20                  # of a failed app, shown to the pusher
KEPT = 5                        # releases that one can go back to, the live one included
LISTED = 50                     # numbers for which a failed release is remembered
SPACE = 512                     # MB that must be free before a build
DEFAULT_BRANCHES = ('main', 'master')
HTTP_PORTS = ('80', '8080', '8000', '5000', '3000', '443')

ENVIRONMENT = {
    'PATH': '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
    'HOME': '/root', 'LC_ALL': 'C', 'GIT_NO_REPLACE_OBJECTS': '1',
    'BUILDKIT_PROGRESS': 'plain', 'BUILDX_NO_DEFAULT_ATTESTATIONS': '1'}

# Images that Dockerfiles start from: an app of that name would poison their FROM.
BASE_IMAGES = set('''
    almalinux alpine amazonlinux archlinux bash buildpack-deps busybox caddy centos
    clojure composer consul couchdb debian docker dotnet elasticsearch elixir erlang
    fedora gcc ghost golang gradle haproxy haskell httpd influxdb java jetty jruby julia
    kong mariadb maven memcached mongo mono mysql nats nginx node openjdk oraclelinux perl
    php postgres pypy python r-base rabbitmq redis registry rockylinux ruby rust scratch
    solr swift tomcat traefik ubuntu varnish wordpress'''.split())
SYSTEM_NAMES = set('''apt avahi-daemon containerd cron dbus default docker git
    gitreceive init mail network networking nginx plan receive root rsyslog ssh sshd
    sudo systemd udev upstart'''.split())

LAUNCHER = '''#!{python} {flags}
import gc, os, sys
gc.disable()
sys.path.insert(0, '{library}')
import dockhand
os._exit(dockhand.main({role!r}, {user!r}))
'''
HOOK = '#!/bin/sh\nexec sudo -n %s %s "$DOCKHAND_APP" "$DOCKHAND_KEY"%s\n'
HOOKS = [('update', HOOK % (RECEIVE, 'update', ' "$@"')),
         ('post-receive', HOOK % (RECEIVE, 'post-receive', ''))]
REPOSITORY_CONFIG = '''[core]
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
'''
UNIT_TEXT = '''[Unit]
Description=dockhand: put right what a crash left of a deploy
After=docker.service
Before=nginx.service

[Service]
Type=oneshot
ExecStart={program} recover

[Install]
WantedBy=multi-user.target
'''
BOOT_JOB_TEXT = '''description "dockhand: put right what a crash left of a deploy"
start on started docker
task
exec {program} recover
'''
KEYS = '.ssh/authorized_keys'
KEYS_BEGIN = '# dockhand: keys from here to the next mark; see `dockhand keys`'
KEYS_END = '# dockhand: end of keys'
KEY_OPTIONS = 'no-port-forwarding,no-X11-forwarding,no-agent-forwarding,no-pty,no-user-rc'
KEY_LINE = r'command="\S+ serve ([^" ]+)([^"]*)",\S+ (\S+) (\S+)'

# ---- The little OS layer ---------------------------------------------------------------

def filled(text, values):
    """A message with its values; without any, the text is as it is and may hold a `%`."""
    return text % values if values else text

class Failure(Exception):
    """One line for a person: what is wrong and what to do. The exit status is 1."""
    def __init__(self, text, *values):
        Exception.__init__(self, filled(text, values))

def refuse_if(wrong, text, *values):
    if wrong:
        raise Failure(text, *values)

class Stopped(Exception):
    """A signal came that would have ended the process."""

class Usage(Failure):
    """A command line that is none. The exit status is 2."""

class Voice(object):
    """Writes lines to a pusher who may be gone, stopped or slow, and never hangs on it.
    git leaves its end of the pipe open and unread then: a plain write would block for
    ever after 64 KB. After `patience` seconds of waiting in all it is silent."""
    def __init__(self, fd, patience=PATIENCE):
        self.fd, self.patience = fd, patience

    def __call__(self, text, *values):
        data, poll = to_bytes(filled(text, values) + '\n'), select.poll()
        poll.register(self.fd, select.POLLOUT)
        while data and self.patience > 0:
            begun = monotonic()
            ready = poll.poll(self.patience * 1000)
            self.patience -= monotonic() - begun
            try:
                data = data[os.write(self.fd, data[:4096]):] if ready else data
            except EnvironmentError:
                self.patience = 0

say = Voice(2)
tell = Voice(1, patience=3600)      # for the commands that people run, and may page

def step(text, *values):
    say('-----> ' + text, *values)

def detail(text, *values):
    for line in filled(text, values).splitlines():
        say('       ' + line)

def log(text, *values):
    """A line in the system's log: who changed what, or was refused."""
    import syslog
    syslog.openlog('dockhand')
    syslog.syslog(printable(filled(text, values), 500))

def printable(text, limit=80):
    """What a stranger sent, fit for a message: printable ASCII, not too long."""
    text = re.sub(r'[^ -~]', '?', text)
    return text if len(text) <= limit else text[:limit] + '...'

def plain_line(text):
    """A line of a command's output without control characters and colours."""
    text = re.sub(r'\x1b\[[0-9;?]*[ -/]*[@-~]', '', text)
    return re.sub(r'[\x00-\x08\x0b-\x1f\x7f]', '', text).rstrip()

Result = namedtuple('Result', 'status out err')
Account = namedtuple('Account', 'name uid gid home shell')

def execute(argv, env=None, cwd='/', account=None, each=None):
    """Run a command, never through a shell, as an Account; a Result(status, out, err).
    env: added to ENVIRONMENT; each: gets each line of both its streams as it comes."""
    process = start_process(argv, env, cwd, account, bool(each))
    try:
        if each:
            read_lines(process.stdout.fileno(), each)
        out, err = process.communicate()
    except BaseException:
        process.kill()
        process.stdout.close()
        process.wait()
        raise
    return Result(process.returncode, to_text(out), to_text(err or b''))

def start_process(argv, env, cwd, account, together):
    """Start a command, which gets nothing of ours; its output through pipes, or one."""
    from subprocess import PIPE, STDOUT, Popen
    variables = dict(ENVIRONMENT, **(env or {}))
    if account:
        variables.update(HOME=account.home, USER=account.name, LOGNAME=account.name)

    def prepare():
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        if account and os.geteuid() == 0:
            os.setgid(account.gid)
            os.initgroups(account.name, account.gid)
            os.setuid(account.uid)
    try:
        with open(os.devnull) as null:
            return Popen(argv, stdin=null, stdout=PIPE,
                         stderr=STDOUT if together else PIPE, env=variables, cwd=cwd,
                         close_fds=True, preexec_fn=prepare)
    except OSError as error:
        raise Failure('%s: %s', argv[0], error.strerror)

def read_lines(fd, each, silence=20):
    """Give each line that comes from a pipe to `each`; a sign of life when none does."""
    begun, rest, data = monotonic(), b'', None
    while data != b'':
        if not select.select([fd], [], [], silence)[0]:
            each('... still busy after %d s' % (monotonic() - begun))
            continue
        data = os.read(fd, 65536)
        lines = (rest + data).replace(b'\r', b'\n').split(b'\n')
        rest = lines.pop() if data else b''
        for line in lines:
            each(plain_line(to_text(line)))

class Host(object):
    """Where the machine's files are, how a command is run there: the seam for tests.
    `ask` runs a command that may fail, with execute's options, and gives its Result."""
    def __init__(self, root='/', run=execute, user='git'):
        self.root, self.ask, self.user = root, run, user

    def path(self, *parts):
        return os.path.join(self.root, *[part.lstrip('/') for part in parts])

    def text(self, *parts):
        """The text of a file, '' where there is none."""
        return read_file(self.path(*parts)) or ''

    def run(self, argv, **options):
        """Run a command that must succeed; its standard output."""
        result = self.ask(argv, **options)
        if result.status:
            raise command_failed(argv, result)
        return result.out

    def run_unless(self, pattern, argv, **options):
        """Run a command; False where it fails with words that match, as is expected."""
        result = self.ask(argv, **options)
        if result.status and not re.search('(?i)' + pattern, result.err + result.out):
            raise command_failed(argv, result)
        return not result.status

    def account(self):
        """The user who owns the repositories and the keys; None before `install`."""
        fields = r':[^:\n]*:(\d+):(\d+):[^:\n]*:([^:\n]*):([^:\n]*)$'
        for uid, gid, home, shell in re.findall(
                '(?m)^' + re.escape(self.user) + fields, self.text('/etc/passwd')):
            return Account(self.user, int(uid), int(gid), home, shell or '/bin/sh')
        return None

    def home(self):
        account = self.account()
        return account.home if account else '/home/' + self.user

def command_failed(argv, result):
    """The Failure `docker start blog--3 failed (1): the last line that it said`."""
    said, command = last_line(result.err or result.out), ' '.join(argv[:4])
    return Failure('%s failed (%d)%s', command, result.status, said and ': ' + said)

def last_line(text):
    """The last line that a command said: docker repeats itself for each name."""
    text = re.sub(r'(?m)^Error: failed to start containers.*', '', text)
    return plain_line(text.strip().rpartition('\n')[2])

def read_file(path):
    """The text of a file; None where there is none, or of a process that has gone."""
    try:
        with open(path, 'rb') as source:
            return to_text(source.read())
    except EnvironmentError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESRCH):
            return None
        raise

def children(host, parent):
    """{process id: command line, a NUL after each word} of what a process started."""
    found = [(pid, host.text('/proc', pid, 'stat').rpartition(')')[2].split())
             for pid in os.listdir(host.path('/proc')) if pid.isdigit()]
    return dict((pid, host.text('/proc', pid, 'cmdline')) for pid, fields in found
                if fields[1:2] == [parent])

@contextmanager
def replacing(path):
    """A name beside a path to write to; it takes the path's place if all goes well."""
    temporary = temporary_of(path)
    try:
        remove_file(temporary)
        yield temporary
        os.rename(temporary, path)
    except BaseException:
        remove_file(temporary)
        raise
    sync_folder(os.path.dirname(path))

def replace_file(path, text, mode=0o644, account=None, check=None):
    """Replace a file whole: a crash leaves the old or the new; True if it changed.
    `check` gets the path of the new file beforehand, to raise if it will not do."""
    if read_file(path) == text and stat.S_IMODE(os.stat(path).st_mode) == mode:
        remove_file(temporary_of(path))
        return False
    with replacing(path) as temporary:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, 'wb') as target:
            target.write(to_bytes(text))
            target.flush()
            os.fchmod(fd, mode)
            os.fchown(fd, *account[1:3] if account else (-1, -1))
            os.fsync(fd)
        if check:
            check(temporary)
    return True

def temporary_of(path):
    """Where a file is written before it gets its name; what a crash may leave."""
    return os.path.join(os.path.dirname(path), '.%s.new' % os.path.basename(path))

def replace_link(path, target):
    """Point a symbolic link somewhere else in one step; True if it changed."""
    if os.path.islink(path) and os.readlink(path) == target:
        return False
    with replacing(path) as temporary:
        os.symlink(target, temporary)
    return True

def remove_file(path):
    """Remove a file or a link; True if there was one."""
    try:
        os.unlink(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise
    sync_folder(os.path.dirname(path))
    return True

def sync_folder(path):
    """Make what was renamed or removed in a folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

def list_folder(path):
    """The names in a folder, in their order; [] where there is none."""
    return sorted(os.listdir(path)) if os.path.isdir(path) else []

def make_folder(path, mode=0o755, account=None):
    """Make a folder, and those above it that are missing; True if it was not as asked."""
    if not os.path.isdir(path):
        os.makedirs(path)
    found = os.stat(path)
    os.chmod(path, mode)
    os.chown(path, *account[1:3] if account else (-1, -1))
    return os.stat(path)[:6] != found[:6]

@contextmanager
def locked(path, purpose):
    """Hold a lock on a file that is never deleted; the purpose is written in it."""
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        os.makedirs(folder, 0o755)
    refuse_if(os.lstat(folder).st_uid != os.geteuid(), 'somebody else made %s, and could '
              'mislead root there: sudo rm -r %s', folder, folder)
    with open(path, 'a+') as holder:
        fcntl.fcntl(holder, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        try:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except EnvironmentError:
            step('Waiting for ' + ((read_file(path) or '').strip() or 'another command'))
            fcntl.flock(holder, fcntl.LOCK_EX)
        holder.truncate(0)
        holder.write('%s, since %s\n' % (purpose, time.strftime('%H:%M:%S')))
        holder.flush()
        try:
            yield
        finally:
            holder.truncate(0)

def attempt(title, function, *args):
    """Call a function; False where it fails, which is told under a title."""
    try:
        function(*args)
        return True
    except (Failure, EnvironmentError) as error:
        say('dockhand: %s: %s', title, error)
        return False

@contextmanager
def undone_by(function, *args):
    """If the block raises, a function undoes what was done. The first error wins."""
    try:
        yield
    except BaseException:
        on_signals(signal.SIG_IGN)
        attempt('while undoing', function, *args)
        raise

def leave(number, frame):
    """What would end the process is raised, so that what was begun is undone."""
    raise Stopped('stopped by signal %d' % number)

def on_signals(action):
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, action)

# ---- What is pushed: names, ssh commands, refs, keys (pure functions) ------------------

APP_NAME = re.compile(r'[a-z][a-z0-9]*(?:[._-][a-z0-9]+)*\Z')
KEY_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._@-]{0,63}\Z')
OBJECT_ID = re.compile(r'(?:[0-9a-f]{40}|[0-9a-f]{64})\Z')

def check_app_name(name):
    """An app's name as it is, or Failure. It is never repaired."""
    if not 2 <= len(name) <= 40 or not APP_NAME.match(name) or name.endswith('.git'):
        raise Failure('"%s" is no name for an app: 2 to 40 of a-z, 0-9, and single "-", '
                      '"_" or "." between them, a letter first', printable(name))
    refuse_if(name in BASE_IMAGES, '"%s" is an image that Dockerfiles start from; an app '
              'of that name would take its place: choose another name', name)
    if name in SYSTEM_NAMES or name.startswith('dockhand'):
        raise Failure('"%s" is a name that the server itself uses: choose another', name)
    return name

def check_key_name(name):
    refuse_if(not KEY_NAME.match(name), '"%s" is no name for a key: up to 64 of a-z, '
              'A-Z, 0-9, and "._@-" after the first', printable(name))
    return name

def parse_ssh_command(command):
    """What an ssh client asks for, as (verb, app): two strings; Failure for all the rest.
    git sends `git-receive-pack 'app.git'` for a push, `git-upload-pack 'app.git'` for a
    clone or fetch (git-receive-pack(1)); after ssh://HOST the path has a "/" first."""
    refuse_if(not command, 'no shell here: git push git@HOST:APP.git main')
    match = re.match(r"git[ -](receive-pack|upload-pack) '/?([^']*?)(?:\.git)?'\Z",
                     command)
    refuse_if(not match, '"%s" is not for this key: it can git push, fetch and clone',
              printable(command))
    return match.group(1), check_app_name(match.group(2))

def judge_ref(ref, new, branch):
    """'deploy', 'plan', 'store', or Failure; branch: None before the first deploy."""
    wanted = [branch] if branch else DEFAULT_BRANCHES
    if ref.startswith('refs/tags/'):
        return 'store'
    if not ref.startswith('refs/heads/'):
        raise Failure('%s is refused: push a branch or a tag', printable(ref))
    refuse_if(not new.strip('0'), 'branches are not deleted here; to remove the app, on '
              'the server: sudo dockhand destroy APP')
    name = ref[len('refs/heads/'):]
    refuse_if(name != 'plan' and name not in wanted, 'only %s is deployed; to deploy '
              'this: git push REMOTE HEAD:%s', ' or '.join(wanted), wanted[0])
    return 'plan' if name == 'plan' else 'deploy'

Key = namedtuple('Key', 'type blob name apps')      # apps: () where it may push every app

def parse_public_keys(text):
    """[(type, base64 blob)] of lines as in authorized_keys (sshd(8)), without options."""
    refuse_if(not text.strip(), 'no key came in: cat ~/.ssh/id_ed25519.pub (or '
              'id_rsa.pub) | ssh HOST "sudo dockhand upload-key NAME"')
    if 'PRIVATE KEY' in text:
        raise Failure('this is a private key: keep it, send the file that ends in .pub')
    lines = [line.strip() for line in text.replace('\r', '\n').split('\n')]
    found = [parse_public_key(line) for line in lines if line and line[0] != '#']
    refuse_if(not found, 'no key among these lines')
    return found

def parse_public_key(line):
    import base64
    kind, text = (line.split(None, 2) + [''])[:2]
    try:
        blob = base64.b64decode(to_bytes(text))
    except (TypeError, ValueError):
        blob = b''
    inside = b'\0\0\0' + to_bytes(chr(len(kind) % 128) + kind)
    refuse_if(
        not re.match(r'[a-z0-9.@-]+\Z', kind) or not blob.startswith(inside)
        or to_text(base64.b64encode(blob)) != text, '"%s" is no public key: a line of '
        'TYPE BASE64 COMMENT is, as in id_ed25519.pub', printable(line, 40))
    return kind, text

def fingerprint(blob):
    """SHA256 of a key as OpenSSH prints it since 6.8."""
    import base64
    import hashlib
    digest = hashlib.sha256(base64.b64decode(to_bytes(blob))).digest()
    return 'SHA256:' + to_text(base64.b64encode(digest)).rstrip('=')

def split_authorized_keys(text):
    """(lines before our marks, our keys, lines after) of an authorized_keys file."""
    lines = re.sub(r'\n\Z', '', text).split('\n') if text else []
    first = (lines + [KEYS_BEGIN]).index(KEYS_BEGIN)
    ours = list(takewhile(bool, (re.match(KEY_LINE, line) for line in lines[first + 1:])))
    keys = [Key(*match.group(3, 4, 1) + (tuple(match.group(2).split()),))
            for match in ours]
    after = [line for line in lines[first + 1 + len(keys):] if line != KEYS_END]
    return lines[:first], keys, after

def render_authorized_keys(before, keys, after):
    """The file anew: who has a key of ours reaches `dockhand serve`, no shell."""
    ours = ['command="%s",%s %s' % (' '.join((PROGRAM, 'serve', key.name) + key.apps),
                                    KEY_OPTIONS, ' '.join(key[:3])) for key in keys]
    refuse_if(any(len(line) > 8000 for line in ours), 'too many apps for one key: sshd '
              'reads lines of up to 8192 bytes')
    return '\n'.join(before + [KEYS_BEGIN] + ours + [KEYS_END] + after) + '\n'

def add_keys(keys, uploaded, name, apps):
    """The keys with those uploaded under a name; Failure if one has another name."""
    for key in keys:
        if key.name != name and (key.type, key.blob) in uploaded:
            raise Failure('this key is known as "%s": dockhand remove-key %s first, or '
                          'go on using it', key.name, key.name)
    kept = [key._replace(apps=apps) if key.name == name else key for key in keys]
    new = [Key(kind, blob, name, apps) for kind, blob in uploaded]
    return kept + [key for at, key in enumerate(new) if key not in kept + new[:at]]

# ---- Jobs: upstart.conf read and checked, its `docker run` understood (pure functions) -

# value: as init takes it, without comments and quotes; text: as it is written;
# commands: the simple commands of an exec or a script, [] of another
Stanza = namedtuple('Stanza', 'name value text line commands')
Word = namedtuple('Word', 'text value line offset')         # value: without its quotes
# verb: what docker is told to do, None for another command; rest: the words after that
Command = namedtuple('Command', 'words verb rest operator')     # operator: what ends it
Option = namedtuple('Option', 'name value word')            # of docker run; its long name
Run = namedtuple('Run', 'options image command line')
Published = namedtuple('Published', 'address host container protocol')

# Long patterns are compiled where they are used: a push starts this file three times.
# One stanza of init(5), as of Upstart 1.13: a line, continued by a backslash at its end,
# in `start on` and `stop on` by an open parenthesis; scripts end with `end script`.
# It matches two groups, a name and a value, none in an empty line or a comment, and
# `trouble`, all the rest of the file, where init knows no stanza.
STANZA = r'''(?x)[ \t]*(?:
    ((?:(?:pre|post)-(?:start|stop)[ \t]+)?script)[ \t\r]*(?:\#[^\n]*)?\n
        ((?:[^\n]*\n)*?)[ \t]*end[ \t]+script[ \t]*(?:\#[^\n]*)?
  | ((?:start|stop)[ \t]+on)\b
        ((?:\((?:[^()]|\([^()]*\))*\)|\\\r?\n|[^\n])*)
  | ((?:(?:pre|post)-(?:start|stop)[ \t]+)?exec|kill[ \t]+(?:signal|timeout)
      |normal[ \t]+exit|reload[ \t]+signal|description|author|version|usage|instance|env
      |export|emits|manual|expect|task|respawn|console|umask|nice|oom|limit|chroot|chdir
      |setuid|setgid|debug|apparmor|cgroup)(?![\w-])
        (?P<value>(?:\\\r?\n|[^\n])*)
  | (?:\#[^\n]*)?
  )[ \t\r]*(?:\n|\Z) | (?P<trouble>[\s\S]+)'''

# What a stanza's value must match, and what to say where it does not.
WANTED_VALUES = {
    'exec': (r'(?s).', 'a command is wanted'),
    'kill timeout': (r'\d+\Z', 'a number of seconds is wanted'),
    'kill signal': (r'\D|\Z', 'a number crashes init 1.5; write its name, as in SIGINT'),
    'task': (r'none\Z', 'dockhand runs services that go on; use cron for what ends'),
    'instance': (r'none\Z', 'one app is one service; push it under several names'),
    'expect': (r'none\Z', 'docker run does not fork, init would wait on; remove it')}
REFUSED_OPTIONS = {
    'detach': 'a detached container leaves init nothing to watch; remove it',
    'interactive': 'a service has no terminal; remove it',
    'tty': 'a service has no terminal; remove it',
    'lxc-conf': 'docker has had no such option since 1.10; remove it'}

# Options of `docker run` that take no value, and the letters for those with and without.
FLAGS = set('''
    detach disable-content-trust help init interactive no-healthcheck oom-kill-disable
    privileged publish-all quiet read-only rm sig-proxy tty use-api-socket'''.split())
LETTERS = dict(zip('acdehilmpPqtuvw', '''
    attach cpu-shares detach env hostname interactive label memory publish publish-all
    quiet tty user volume workdir'''.split()))
# What docker before 1.10 took with a single dash.
SINGLE_DASH = set('''rm name sig-proxy privileged cidfile entrypoint link expose dns
    volumes-from lxc-conf'''.split())
# A docker command up to its verb, each word ended by a NUL: keywords and variables of the
# shell, docker itself, its own options; of another command, nothing.
DOCKER = r'''(?x)(?:(?:(?:exec|sudo|then|do|else|!|\{|\w+=[^\0]*)\0)*(?:[^\0]*/)?docker\0
    (?:(?:-H|--host|-c|--context|--config|-l|--log-level)\0[^\0]*\0|-[^\0]*\0)*
    (?:container\0)?(?P<verb>[^\0]*)\0)?'''

SHELL_TOKEN = r'''(?xs)
    (?P<blank>[ \t\r]+|\\\r?\n) | (?P<comment>\#[^\n]*) | (?P<operator>\n|[;&|<>()]+|\Z)
  | (?P<word>(?:\\.|"(?:\\.|[^"\\])*"|'[^']*'|\$\([^()]*\)|`[^`]*`|[^\s;&|<>()"'\\])+)
  | (?P<stray>.)'''
QUOTED = r"""(?s)'([^']*)'|\\(.)|"((?:\\.|[^"\\])*)"|([^'"\\]+)"""
VARIABLE = r'\\(?P<escaped>[$`"\\])|\$(?P<brace>\{)?(?P<name>\w+)(?(brace)\})|[$`]'

def job_failure(line, text, *values):
    return Failure('upstart.conf:%d: %s', line, filled(text, values))

def parse_job(text):
    """The text of an upstart.conf as [Stanza]; Failure by line where init balks."""
    stanzas = []
    for match in re.finditer(STANZA, text):
        if match.lastgroup == 'trouble':
            line = text.count('\n', 0, match.start()) + 1
            raise job_failure(line, stanza_trouble(match.group()))
        if match.lastindex:
            stanzas.append(read_stanza(match))
    return stanzas

def stanza_trouble(text):
    two_words = r'\s*(?:(?:pre-|post-|kill|normal|start|stop|reload)\S*\s+)?\S*'
    words = re.match(two_words, text).group().split()
    if 'script' in words:
        return '`script` without `end script`'
    return 'unknown stanza `%s`' % printable(' '.join(words))

def read_stanza(match):
    """The Stanza that STANZA matches."""
    name, text = match.group(match.lastindex - 1, match.lastindex)
    begin, tokens = match.start(match.lastindex), list(re.finditer(SHELL_TOKEN, text))
    line = match.string.count('\n', 0, begin) + 1
    if match.group('value') and {'"', "'"} & set(each.group() for each in tokens):
        raise job_failure(line, 'a quote is not closed')
    plain = ''.join(each.group() for each in tokens if each.lastgroup != 'comment')
    runs = name.endswith(('exec', 'script'))
    return Stanza(' '.join(name.split()), unquote(plain.strip()), text, line,
                  read_commands(tokens, line, begin) if runs else [])

def read_commands(tokens, line, offset):
    """[Command] of the matches of SHELL_TOKEN in a text that begins there."""
    found, words = [], []
    for match in tokens:
        if match.lastgroup in ('word', 'stray'):
            text, at = match.group(), match.start()
            words.append(Word(text, unquote(text), line + match.string.count('\n', 0, at),
                              offset + at))
        elif match.lastgroup == 'operator' and words:
            docker = re.match(DOCKER, ''.join(word.value + '\0' for word in words))
            rest = words[docker.group().count('\0'):]
            found.append(Command(words, docker.group('verb'), rest, match.group()))
            words = []
    return found

def unquote(text, variable=lambda match: match.group('escaped') or match.group()):
    """A word without its quotes; `variable` gives the value of a match of VARIABLE."""
    def inside(match):
        part, kept = match.group(match.lastindex), match.lastindex < 3
        return part if kept else re.sub(VARIABLE, variable, part)
    return re.sub(QUOTED, inside, text)

def read_run(command):
    options, words = [], list(command.rest)
    while words and re.match('-.', words[0].value):
        word = words.pop(0)
        if word.value == '--':
            break
        for name, value in split_option(word.value):
            if value is None and name not in FLAGS:
                value = words.pop(0).value if words else ''
            options.append(Option(name, value, word))
    if not words:
        raise job_failure(command.words[0].line, '`docker run` names no image')
    return Run(options, words[0].value, [word.value for word in words[1:]], words[0].line)

def split_option(text):
    """[(long name, value or None)] of one word: --name=x, -rm, -itp80:80."""
    name, equals, value = text.lstrip('-').partition('=')
    if text.startswith('--') or name in SINGLE_DASH:
        return [(name, value if equals else None)]
    name, rest = LETTERS.get(text[1:2], text[1:2]), text[2:]
    if name in FLAGS and rest and rest[0] != '=':
        return [(name, None)] + split_option('-' + rest)
    return [(name, rest.lstrip('=') or None)]

def runs_of(job):
    """Every `docker run` of the main process, the last `exec` or `script`, as [Run]."""
    mains = [stanza for stanza in job if stanza.name in ('exec', 'script')]
    return [read_run(command) for stanza in mains[-1:] for command in stanza.commands
            if command.verb == 'run']

def modernize_job(text):
    """(text, [old words]): docker's old single-dash options get their second dash."""
    old = [option.word for run in runs_of(parse_job(text)) for option in run.options
           if option.name in SINGLE_DASH and not option.word.value.startswith('--')]
    for word in reversed(old):
        text = text[:word.offset] + '-' + text[word.offset:]
    return text, [word.text for word in old]

def parse_published(value):
    """The Published of a `-p` value: [[ADDRESS:]HOST:]CONTAINER[/PROTOCOL]."""
    match = re.match(r'(?:(?:(.*):)?([^:]*):)?([^:/]*)(?:/(.*))?', value)
    return Published(*match.groups('')[:3] + (match.group(4) or 'tcp',))

def published_ports(job):
    """The Published of every `-p` of the job's last `docker run`."""
    return [parse_published(option.value) for run in runs_of(job)[-1:]
            for option in run.options if option.name == 'publish']

def check_job(job, app, proxied=(), volumes=()):
    """What is doubtful, as [(line, text)]; Failure for what is known to kill a deploy.
    proxied: the ports on the host that the app's proxy file passes requests to
    volumes: the paths that the image declares as VOLUME"""
    if not {'exec', 'script'} & set(stanza.name for stanza in job):
        raise job_failure(1, 'no `exec` or `script`: say how to run the app, as in '
                          '`exec docker run --rm %s`', app)
    for stanza in job:
        check_stanza(stanza)
    doubts = [(stanza.line, 'note: under Upstart this does not come back when docker is '
               'restarted; `start on started docker` and `stop on stopping docker` does')
              for stanza in job if stanza.name == 'start on'
              and re.search(r'filesystem\s+and\s+started\s+docker', stanza.value)]
    for run in runs_of(job):
        check_run(run, job)
        doubts.extend(doubts_of_image(run, app, volumes))
        doubts.extend(doubts_of_ports(run, proxied))
    return doubts

def check_stanza(stanza):
    pattern, said = WANTED_VALUES.get(stanza.name, ('', ''))
    if not re.match(pattern, stanza.value):
        text = printable((stanza.name + ' ' + stanza.value).strip())
        raise job_failure(stanza.line, '`%s`: %s', text, said)
    if stanza.name.endswith('script') and '\r' in stanza.text:
        raise job_failure(stanza.line, 'a script with Windows line ends, which sh takes '
                          'for text: save it with Unix ones')

def check_run(run, job):
    """Failure for what kills a deploy; a name must be free again at the next start."""
    freed = [word.value for stanza in job for command in stanza.commands
             if command.verb == 'rm' for word in command.rest]
    options = [each for each in run.options if each.name not in FLAGS
               or (each.value or 't').lower() in ('true', '1', 't')]
    removed = 'rm' in [each.name for each in options] or '$' in ''.join(freed)
    for name, value, word in options:
        wrong = REFUSED_OPTIONS.get(name)
        if name == 'name' and len(value) < 2:
            wrong = 'docker wants a name of two characters at least'
        elif name == 'name' and not removed and value not in freed:
            wrong = 'without --rm the next start finds this name taken; add --rm'
        if wrong:
            raise job_failure(word.line, '`%s`: %s', word.text, wrong)

def doubts_of_image(run, app, volumes):
    given = '\n'.join('%s %s' % option[:2] for option in run.options)
    mounted = re.findall(r'(?m)^(?:volume|tmpfs|mount) (?:.*(?:dst|destination|target)=|'
                         r'[^:\n]*:(?=/))?(/[^:,\n]*?)/?(?:[:,]|$)', given)
    if not is_image_of(app, run.image):
        yield run.line, ('warning: it runs the image `%s`, not what this repository '
                         'builds, `%s`' % (printable(run.image), app))
    elif 'volumes-from' not in [option.name for option in run.options]:
        for path in sorted(set(path.rstrip('/') for path in volumes) - set(mounted)):
            yield run.line, ('warning: VOLUME %s is mounted nowhere, its data goes at '
                             'every stop; to keep it: `-v /srv/%s%s:%s`'
                             % (path, app, path, path))

def doubts_of_ports(run, proxied):
    """Docker's published ports pass by the firewall that people know, ufw."""
    for option in [each for each in run.options if each.name == 'publish']:
        address, outside, inside, protocol = parse_published(option.value)
        is_web = outside in proxied or inside in HTTP_PORTS
        if is_web and not address and protocol == 'tcp':
            yield option.word.line, (
                'warning: `-p %s` is open to the world, past ufw; behind nginx: '
                '`-p 127.0.0.1:%s:%s`' % (option.value, outside or inside, inside))

def is_image_of(app, image):
    return image in (app, app + ':latest')

# What a job is where docker, not Upstart, keeps it running: the arguments of `docker
# create` before and after the image, and what the job gives its commands.
Container = namedtuple('Container', 'options image command env folder at_boot grace')

DROPPED = ('attach', 'cidfile', 'detach', 'detach-keys', 'interactive', 'name', 'pull',
           'quiet', 'restart', 'rm', 'sig-proxy', 'tty')
NO_EQUIVALENT = {
    'chroot': 'the container has a root of its own; remove it',
    'normal exit': 'docker restarts it whatever it exits with; remove it'}
HARMLESS = ('true', ':', 'set', 'sleep', 'echo', 'exit')

def container_of(job, app):
    """The Container that does what the job says; Failure by line where none does."""
    last = dict((stanza.name, stanza.value) for stanza in job)
    env = dict(each.value.partition('=')[::2] for each in job if each.name == 'env')
    run, stop = only_run(job, app, env), last.get('kill signal')
    options = ['--' + name + ('' if value is None else '=' + value)
               for name, value, _ in run.options if name not in DROPPED]
    options += ['--stop-signal=' + stop] if stop else []
    starts = [each.name for each in job if each.name in ('start on', 'manual')]
    return Container(options, run.image, run.command, env, last.get('chdir', '/'),
                     starts[-1:] == ['start on'], last.get('kill timeout', '5'))

def no_equivalent(place, what, remedy):
    """The Failure for a Stanza or a Word."""
    return job_failure(place.line, '`%s` cannot be had where docker instead of Upstart '
                       'runs the app, as here: %s', printable(what), remedy)

def only_run(job, app, env):
    """The one `docker run` of a job whose other commands can be left out."""
    main = [each for each in job if each.name in ('exec', 'script')][-1]
    runs = [each for each in main.commands if each.verb == 'run']
    if len(runs) != 1:
        raise no_equivalent(main, main.name, 'it must hold one `docker run`')
    words, _, rest, operator = runs[0]
    if operator.strip('\n;') not in ('', '||', '&&'):
        raise no_equivalent(words[0], operator,
                            'docker keeps what it prints: dockhand logs ' + app)
    for stanza in job:
        if stanza.name in NO_EQUIVALENT:
            raise no_equivalent(stanza, stanza.name, NO_EQUIVALENT[stanza.name])
        if stanza is main or stanza.name.startswith(('pre-', 'post-')):
            check_harmless([each for each in stanza.commands if each is not runs[0]])
    return read_run(runs[0]._replace(rest=[
        word._replace(value=value) for word in rest for value in expand_word(word, env)]))

def check_harmless(commands):
    """Refuse what does not happen anyway around a container's start and stop."""
    before = ''
    for words, verb, _, operator in commands:
        known = verb in ('rm', 'stop', 'kill', 'pull') or words[0].value in HARMLESS
        if operator == '|' or not known and not set(before) & set('<>'):
            raise no_equivalent(words[0], words[0].text,
                                'do it in the Dockerfile, or when the container starts')
        before = operator

def expand_word(word, env):
    """The values of a word, `$NAME` of the job's own env put in as the shell would."""
    def value(match):
        name, escaped = match.group('name', 'escaped')
        if not escaped and name not in env:
            raise no_equivalent(word, word.text, 'only the `env` of the job is known')
        return escaped or env[name]
    if word.text in ('"', "'"):
        raise job_failure(word.line, 'a quote is not closed')
    whole = unquote(word.text, value)
    # alone and unquoted: the shell splits it
    return whole.split() if re.match(r'\$\{?\w+\}?\Z', word.text) else [whole]

# ---- Proxy files (pure functions) ------------------------------------------------------

Server = namedtuple('Server', 'line listens names')     # listens: [Listen]
Listen = namedtuple('Listen', 'address port default line')
ALL = ('*', '[::]')             # the addresses of a Listen that mean every address

NGINX_TOKEN = r'''(?xs)
    (?P<blank>\s+) | (?P<comment>\#[^\n]*) | (?P<mark>[;{}])
  | (?P<word>"(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' | (?:\\.|\$\{[^}]*\}|[^\s;{}])+)
  '''

def headed(app, what, text):
    """A pushed file under our line, which one copied from the server has already."""
    line = "# dockhand: %s's %s, installed from its repository at each push\n" % (
        app, what)
    return text if text.startswith(line) else line + text

def is_ours(text, app):
    """Whether dockhand wrote this job or proxy file, or None, for this app."""
    return (text or '').startswith("# dockhand: %s's" % app)

def servers_of(text):
    """The server blocks of a file in conf.d, as [Server]; lenient, since `nginx -t` has
    the last word. blocks: the words before each brace that is open."""
    found, blocks, words, line = [], [], [], 1
    for match in re.finditer(NGINX_TOKEN, text):
        token = match.group()
        if match.lastgroup == 'word':
            line = line if words else text.count('\n', 0, match.start()) + 1
            words.append(token.strip('"\''))
        elif match.lastgroup == 'mark':
            if blocks == [['server']]:
                read_directive(found[-1], words, line)
            elif (token, blocks, words) == ('{', [], ['server']):
                found.append(Server(line, [], []))
            if token == '{':
                blocks.append(words)
            elif token == '}':
                del blocks[-1:]
            words = []
    for server in found:
        if not server.listens:
            read_directive(server, ['listen', '80'], server.line)
    return found

def read_directive(server, words, line):
    """Note what a Server is told: `server_name NAME...`, or
    `listen [ADDRESS:]PORT|unix:PATH [default_server] ...`."""
    if words[:1] == ['server_name']:
        server.names.extend(name.lower() for name in words[1:])
    elif words[:1] == ['listen'] and words[1:]:
        match = re.match(r'(?:(\[[^]]*\]|[^:\[\]]+):)?(\d+)\Z', words[1])
        address, port = match.groups() if match else (
            words[1], '' if words[1].startswith('unix:') else '80')
        shown = '*' if address in (None, '0.0.0.0') else address
        default = bool({'default_server', 'default'} & set(words[2:]))
        server.listens.append(Listen(shown, port, default, line))

def proxied_ports(text):
    """The ports on this machine that a proxy file passes requests to."""
    return set(re.findall(r'(?:127\.0\.0\.1|localhost|0\.0\.0\.0):(\d+)', text or ''))

def server_claims(server):
    """{what is taken, in words: line}: what one server block of a machine can have."""
    claims = {}
    for address, port, default, line in server.listens:
        where = 'is taken on port ' + port
        for name in server.names or ['']:
            for each in (name[1:], '*' + name) if name.startswith('.') else (name,):
                claims['server_name "%s" %s' % (each, where)] = server.line
        if default:
            claims['default_server %s of %s' % (where, address)] = line
    return claims

def check_proxy(servers, others):
    """Failure where it takes what `others`, {path: [Server]}, have, or is unreachable."""
    taken, shared = {}, set(['80'])
    for path in sorted(others):
        for server in others[path]:
            shared.update(each.port for each in server.listens if each.address in ALL)
            for claim, line in server_claims(server).items():
                taken.setdefault(claim, '%s:%d' % (path, line))
    for server in servers:
        check_listens(server, shared)
        for claim, line in sorted(server_claims(server).items()):
            if claim in taken:
                raise proxy_failure(line, '%s, by %s: change one of the two',
                                    printable(claim, 160), taken[claim])

def proxy_failure(line, text, *values):
    return Failure('nginx-proxy.conf:%d: %s', line, filled(text, values))

def check_listens(server, shared):
    """An unknown name on port 80 is answered by 000-dockhand.conf; a server on one
    address of a shared port gets every request to it, whatever its name."""
    ours = [each.port in ('80', '443') and not each.default for each in server.listens]
    if all(ours) and set(server.names) <= set(['', '_']):
        raise proxy_failure(server.line, 'no request reaches this server: give it a '
                            'server_name, or write `listen 80 default_server;`')
    for address, port, _, line in server.listens:
        if address not in ALL and port in shared:
            raise proxy_failure(line, '`listen %s:%s` would take all requests to that '
                                'address: write `listen %s;`', address, port, port)

def render_catch_all(listens, version, ipv6):
    """000-dockhand.conf: a host name that no app has gets 404, on 443 no handshake.
    listens: every Listen of nginx's other files; version: nginx's, as a tuple"""
    used = set((listen.address, listen.port) for listen in listens)
    claimed = any(listen.default and listen.port == '80' for listen in listens)
    # Before 1.3.10 nginx took included files in no order: the first server is not ours.
    flag = ' default_server' if version < (1, 3, 10) and not claimed else ''
    plain = ['listen 80%s;' % flag]
    if ipv6 and ('[::]', '80') in used:
        only = ' ipv6only=on' if version < (1, 3, 4) else ''
        plain.append('listen [::]:80%s;' % only)
    blocks = [plain + ['server_name _;', 'return 404;']]
    secure = ['listen %s443 ssl;' % ('' if address == '*' else address + ':')
              for address in ('*', '[::]') if (address, '443') in used]
    if secure and version >= (1, 19, 4):
        blocks.append(secure + ['server_name _;', 'ssl_reject_handshake on;'])
    return '# dockhand: what no app answers to; written anew when the apps change\n' + \
        ''.join('server {\n    %s\n}\n' % '\n    '.join(block) for block in blocks)

def stage_nginx_conf(text, files, pid):
    """A copy of nginx.conf that includes these files instead of those in conf.d."""
    includes = '\n'.join('include %s;' % path for path in files)
    text, count = re.subn(r'include\s+(?:/etc/nginx/)?conf\.d/\*(?:\.conf)?\s*;',
                          lambda match: includes, text)
    refuse_if(not count, '%s/nginx.conf has no `include %s/*.conf;`: add it to its http '
              'block', NGINX, PROXIES)
    return 'pid %s;\n' % pid + re.sub(r'(?m)^\s*pid\s[^;]*;', '', text)

def proxy_address(servers):
    """The address that a person would type for a web app, or None."""
    for server in servers:
        port = server.listens[0].port
        names = [name for name in server.names
                 if re.match(r'[a-z0-9][a-z0-9.-]*\Z', name)]
        names += [os.uname()[1]] if server.listens[0].default else []
        if names and port:
            shape = {'80': 'http://%s/', '443': 'https://%s/'}
            return shape.get(port, 'http://%s:' + port + '/') % names[0]
    return None

# ---- Docker and nginx ------------------------------------------------------------------

def docker_version(host):
    """The version of docker's engine, as a tuple; Failure where it does not answer."""
    _, out, err = host.ask(['docker', 'version'])
    match = re.search(r'Server(?: version:|:.*?\bVersion:)\s*(\d[\d.]*)', out, re.S)
    refuse_if(not match, 'docker does not answer: %s',
              last_line(err or out) or 'is it running?')
    return tuple(int(part) for part in match.group(1).strip('.').split('.'))

def inspect(host, *names):
    """docker's description of containers and images, as [dict]; no unknown names."""
    import json
    result = host.ask(('docker', 'inspect') + names)
    if result.status and not re.search('(?i)no such', result.err):
        raise Failure('docker does not answer: ' + last_line(result.err or result.out))
    return json.loads(result.out or '[]')

def running_containers(host, image=None, listed='-q'):
    """docker's description of the containers that run (an image, by id), newest first."""
    ids = host.run(['docker', 'ps', listed, '--no-trunc']).split()
    found = [each for each in (inspect(host, *ids) if ids else [])
             if each['State']['Running'] and image in (None, each['Image'])]
    return sorted(found, key=lambda each: each['State']['StartedAt'], reverse=True)

def kept_ports(host):
    """{(docker-proxy's process id, port)} that docker keeps for no running container.
    All are inspected: docker tells of one that is being started when that is done."""
    proxies = children(host, host.text('/run/docker.pid').strip())
    kept = [(pid, port) for pid, title in proxies.items()
            for port in re.findall(r'docker-proxy\0.*-host-port\0(\d+)', title)]
    running = running_containers(host, None, '-aq') if kept else []
    used = [each['HostPort'] for found in running for places in (
        found['NetworkSettings'].get('Ports') or {}).values() for each in places or []]
    return set(each for each in kept if each[1] not in used)

def free_ports(host, patience=10):
    """Restart docker where it keeps a port, as after a power cut while it started an app:
    nobody can have that port, or it leads to another app (moby/libnetwork#2448)."""
    kept, deadline = kept_ports(host), monotonic() + patience
    while kept and monotonic() < deadline:      # one may be of a container that stops
        time.sleep(0.1)
        kept &= kept_ports(host)
    for _, port in sorted(kept)[:1]:
        refuse_if(not is_systemd(host) and not is_upstart(host), 'docker keeps port %s '
                  'for no container: restart it, then: sudo dockhand recover', port)
        step('docker keeps port %s for no container; restarting it', port)
        host.run(['service', 'docker', 'restart'])

def build_image(host, folder, tag, layers, *options):
    """Build an image from a folder; docker's output goes to the pusher as it comes.
    `layers`, a list, gets the ids of what the older builder makes on the way."""
    heard = deque(maxlen=200)

    def each(line):
        layers.extend(re.findall(r'^ ---> ([0-9a-f]{12})$', line))
        if line and not line.startswith(('DEPRECATED', '            Install the buildx')):
            heard.append(line)
            detail(line)
    command = ('docker', 'build', '--force-rm', '-t', tag) + options + (folder,)
    result = host.ask(command, each=each)
    if result.status:
        docker_version(host)
        why = build_trouble('\n'.join(heard), result.status)
        raise Failure('the build failed: ' + why)

def build_trouble(heard, status):
    if status == 137 or re.search(r'code:? 137\b', heard):
        return 'out of memory (137), the kernel killed it: give the server swap or memory'
    if 'exec format error' in heard:
        return "exec format error: an image for another processor than this server's"
    if 'no space left on device' in heard:
        return 'no space left on device; nothing has changed'
    return 'nothing has changed; mend it and push again'

def tag_image(host, source, target):
    """Move a tag; docker before 1.10 wants to be told that it may."""
    if not host.run_unless('is already', ['docker', 'tag', source, target]):
        host.run(['docker', 'tag', '-f', source, target])

def remove_image_tag(host, tag, *options):
    """Take a tag away, and an unused image with it; False where a container uses it."""
    command = ('docker', 'rmi') + options + (tag,)
    return host.run_unless('no such image|container', command) or not inspect(host, tag)

def written_files(host, container):
    """What a container wrote outside its volumes, as [path], without what is passing."""
    out = host.ask(['docker', 'diff', container]).out
    paths = sorted((line[2:] + '/' for line in out.splitlines()))
    return [path[:-1] for path, following in zip(paths, paths[1:] + [''])
            if not following.startswith(path)
            and not re.match('/(?:dev|proc|run|sys|tmp|var/run|var/tmp)/', path)]

def check_space(host, wanted=SPACE):
    folders = images_folder(host), '/var/lib/containerd', STATE
    for path in [path for path in folders if os.path.isdir(host.path(path))]:
        free = free_bytes(host, path) // 1000000
        refuse_if(free < wanted, '%d MB are free on %s, a build wants %d: docker image '
                  'prune removes what nobody uses', free, path, wanted)

def images_folder(host):
    settings = host.text('/etc/docker/daemon.json')
    moved = re.findall(r'"(?:data-root|graph)"\s*:\s*"([^"]+)"', settings)
    return (moved + ['/var/lib/docker'])[0]

def free_bytes(host, path):
    """The bytes free on the disk of a folder."""
    found = os.statvfs(host.path(path))
    return found.f_bavail * found.f_frsize

def proxy_files(host):
    """{path: text} of nginx's files in conf.d and sites-enabled, not our catch-all."""
    folders = ((PROXIES, '.conf'), (NGINX + '/sites-enabled', ''))
    paths = [folder + '/' + name for folder, ending in folders
             for name in list_folder(host.path(folder)) if name.endswith(ending)]
    return dict((path, host.text(path)) for path in paths
                if path != CATCH_ALL and os.path.isfile(host.path(path)))

def catch_all_text(host, files):
    """What 000-dockhand.conf is to hold beside these files, {path: text}."""
    listens = [listen for text in files.values() for server in servers_of(text)
               for listen in server.listens]
    version = re.findall(r'\d+', host.ask(['nginx', '-v']).err.partition('nginx/')[2])
    return render_catch_all(listens, tuple(map(int, version[:3])),
                            os.path.exists(host.path('/proc/net/if_inet6')))

def check_proxy_file(host, app, text):
    """Failure where this proxy file clashes with another, or nginx refuses it."""
    own, files = PROXIES + '/%s.conf' % app, proxy_files(host)
    others = dict((path, servers_of(files[path])) for path in files if path != own)
    check_proxy(servers_of(text.partition('\n')[2]), others)
    problem = try_nginx(host, app, text)
    if problem and try_nginx(host, app, read_file(host.path(own))):
        raise Failure("nginx's configuration was broken before this push, mend it first: "
                      + problem)
    if problem:
        raise Failure(problem if 'nginx-proxy.conf:' in problem else
                      'nginx-proxy.conf clashes with another file: ' + problem)

def try_nginx(host, app, text):
    """What nginx says against a proxy file in the place of the app's own, or None.
    It is tested in a staged copy: what lies in conf.d is valid at every moment."""
    own = PROXIES + '/%s.conf' % app
    paths = candidate, catch_all, staged, pid = staged_files(app)
    files = dict(proxy_files(host), **{own: text or ''})
    order = [candidate if path == own else path for path in sorted(files)
             if path.startswith(PROXIES)]
    conf = stage_nginx_conf(host.text(NGINX, 'nginx.conf'), [catch_all] + order, pid)
    try:
        for path, new in zip(paths, (files[own], catch_all_text(host, files), conf)):
            replace_file(host.path(path), new)
        result = host.ask(['nginx', '-t', '-q', '-c', staged])
        said = nginx_error(result.err, candidate).replace(catch_all, CATCH_ALL)
        return said if result.status else None
    finally:
        for path in paths:
            remove_file(host.path(path))

def staged_files(app):
    """The files of a test of nginx's configuration with a new file for an app."""
    return ['%s/.dockhand-%s.%s' % (NGINX, app, part)
            for part in ('candidate', 'catch-all', 'nginx', 'nginx.pid')]

def nginx_error(err, candidate='nginx-proxy.conf'):
    """What `nginx -t` says first, about a candidate as `nginx-proxy.conf:LINE: what`."""
    lines = re.findall(r'\[(?:emerg|alert|crit|error)\] (?:\d+#\d+: )?(.*)', err)
    said = plain_line(lines[0] if lines else err.strip() or 'nginx -t failed')
    match = re.match(r'(.*?)(?: in)? %s:(\d+)' % re.escape(candidate), said)
    return str(proxy_failure(int(match.group(2)) - 1, match.group(1))) if match else said

def install_proxy(host, app, text, certain=False):
    """Put an app's proxy file in place, or take it away, and make nginx follow. What is
    certain was live before: it is not checked again, and nginx reloads in any case."""
    path = host.path(PROXIES, app + '.conf')
    with host_lock(host, app):
        found = read_file(path)
        if text == found and not certain:
            return
        if text and not certain:
            check_proxy_file(host, app, text)
        changed = replace_file(path, text) if text else (
            is_ours(found, app) and remove_file(path))
        if write_catch_all(host) or changed or certain:
            reload_nginx(host)

def host_lock(host, app):
    """What apps share (names, nginx) changes under this lock, taken after the app's."""
    return locked(host.path(LOCKS, '.host'), 'a change of nginx for ' + app)

def write_catch_all(host):
    return replace_file(host.path(CATCH_ALL), catch_all_text(host, proxy_files(host)))

def reload_nginx(host):
    """Make nginx take up its configuration; Failure unless it really has.
    `nginx -t` and the reload both succeed while a taken port keeps the old configuration:
    it counts when every earlier worker has gone or says that it is shutting down."""
    master = nginx_master(host)
    if master is None:
        return start_nginx(host)
    earlier = nginx_workers(host, master)
    host.run(['nginx', '-s', 'reload'])
    deadline = monotonic() + RELOAD_TIMEOUT
    while earlier & nginx_workers(host, master):
        refuse_if(monotonic() > deadline, 'nginx keeps its old configuration: '
                  + nginx_complaint(host))
        time.sleep(0.01)

def start_nginx(host):
    """Start nginx by whatever init is there. At boot it waits for `dockhand recover`."""
    state = host.ask(['systemctl', 'is-system-running']).out if is_systemd(host) else ''
    if state.strip() != 'starting':
        refuse_if(host.ask(['service', 'nginx', 'start']).status, 'nginx does not start: '
                  + nginx_complaint(host))

def nginx_complaint(host):
    path, pattern = '/var/log/nginx/error.log', r'.*\[(?:emerg|alert)\].*'
    return plain_line((['see ' + path] + re.findall(pattern, host.text(path)))[-1])

def is_systemd(host):
    return os.path.isdir(host.path('/run/systemd/system'))

def is_upstart(host):
    """Whether PID 1 is Upstart (its tools may lie beside another init)."""
    return not is_systemd(host) and os.path.exists(host.path('/sbin/initctl')) and (
        'upstart' in host.ask(['initctl', 'version']).out)

def nginx_master(host):
    """The process id of nginx's master, None where it does not run."""
    named = re.findall(r'(?m)^\s*pid\s+([^;]+);', host.text(NGINX, 'nginx.conf'))[:1]
    for path in named + ['/run/nginx.pid']:
        pid = host.text(path).strip()
        if pid.isdigit() and 'nginx' in host.text('/proc', pid, 'cmdline'):
            return pid
    return None

def nginx_workers(host, master):
    """The process ids of the workers that still take requests."""
    return set(pid for pid, title in children(host, master).items()
               if 'shutting down' not in title)

# ---- The two engines: what keeps an app running ----------------------------------------

# What the health check looks at. alive: True, False, or None while it is still starting;
# identity changes when the app is started anew; ports: [(address, tcp port)].
State = namedtuple('State', 'alive identity ports health text')

def choose_engine(host):
    return Upstart(host) if is_upstart(host) else Containers(host)

def container_state(found):
    state = found['State']
    alive = state['Running'] and not state.get('Restarting')
    health = (state.get('Health') or {}).get('Status') or ''
    text = 'running' if alive else 'exited with %s' % state.get('ExitCode')
    identity = (found['Id'], state['StartedAt'], found.get('RestartCount'))
    return State(bool(alive), identity, container_ports(found), str(health), text)

def container_ports(found):
    """[(address, port)]: where the published tcp ports of a container really are."""
    settings = found.get('NetworkSettings') or {}
    places = list((settings.get('Networks') or {}).values()) + [settings]
    addresses = [each['IPAddress'] for each in places if each.get('IPAddress')][:1]
    published = (found.get('HostConfig') or {}).get('PortBindings') or {}
    return [(str(address), int(port.split('/')[0])) for address in addresses
            for port in sorted(published) if port.endswith('/tcp')]

class Engine(namedtuple('Engine', 'host')):
    """What keeps apps running. What only one of the two has to do is nothing here."""
    def nothing(self, release):
        pass
    check = prepare = place = withdraw = nothing

def on_container(host, release, *words):
    """Run a docker command on a release's container; False where that is gone."""
    command = ('docker',) + words + (container_name(release),)
    return host.run_unless('No such container', command)

class Containers(Engine):
    """Docker itself keeps the app running: one container a release, named APP--N."""
    def job(self, release):
        """How docker runs a release's job; Failure where it cannot."""
        return container_of(job_of(release), release.app)
    check = job

    def prepare(self, release):
        """Create the container, so that the gap is a stop and a start, no more. That of a
        kept release is there. Until it is checked, docker does not start it at boot."""
        job, host = self.job(release), self.host
        log = [] if any(each.startswith('--log-') for each in job.options) else [
            '--log-driver=json-file', '--log-opt=max-size=10m', '--log-opt=max-file=3']
        image = release.image if is_image_of(release.app, job.image) else job.image
        command = ['docker', 'create', '--name', container_name(release)] + job.options
        command += log + [image] + job.command
        if not host.run_unless('already in use', command, env=job.env, cwd=job.folder):
            on_container(self.host, release, 'update', '--restart', 'no')

    def start(self, release):
        """Start the container; one that was pruned away is made again."""
        if not on_container(self.host, release, 'start'):
            self.prepare(release)
            self.host.run(['docker', 'start', container_name(release)])

    def stop(self, release):
        """Stop it for good: docker's own start must not bring it back beside another."""
        on_container(self.host, release, 'update', '--restart', 'no')
        on_container(self.host, release, 'stop', '-t', self.job(release).grace)

    def revives(self, release):
        """Whether one that does not run is to be started, after a boot or a prune."""
        return self.job(release).at_boot

    def settle(self, release):
        """From now on docker starts it again by itself, at boot too."""
        policy = 'unless-stopped' if self.job(release).at_boot else 'on-failure'
        on_container(self.host, release, 'update', '--restart', policy)

    def state(self, release):
        for found in inspect(self.host, container_name(release)):
            return container_state(found)
        return State(False, None, [], '', 'its container is gone')

    def logs_command(self, release, lines, *follow):
        return ('docker', 'logs', '--tail', lines) + follow + (container_name(release),)

def job_of(release):
    return parse_job(release.job.partition('\n')[2])    # lines count as they were pushed

def container_name(release):
    return '%s--%d' % (release.app, release.number)

HELD = 'manual\n'       # an override that keeps a reboot from starting a mixture

class Upstart(Engine):
    """Upstart keeps the app running, as its upstart.conf says: the job is named APP."""
    def place(self, release):
        replace_file(self.path(release, '.override'), HELD)
        replace_file(self.path(release, '.conf'), release.job)

    def path(self, release, ending):
        return self.host.path(JOBS, release.app + ending)

    def start(self, release):
        path = self.path(release, '.conf')
        if read_file(path) != release.job:
            raise Failure('%s is not that of release %d', path, release.number)
        self.host.run_unless('already running', ['timeout', '60', 'start', release.app])

    def stop(self, release):
        """Stop the job, and the containers that init leaves behind."""
        replace_file(self.path(release, '.override'), HELD)
        self.host.run_unless('Unknown (instance|job)|already been stopped',
                             ['stop', release.app])
        for found in running_containers(self.host, release.image):
            self.host.run_unless('No such', ['docker', 'stop', '-t', '1', found['Id']])

    def revives(self, release):
        """Whether init does not do that: a command was killed that held the job."""
        held, job = self.path(release, '.override'), self.path(release, '.conf')
        return os.path.exists(held) or not os.path.exists(job)

    def settle(self, release):
        remove_file(self.path(release, '.override'))

    def withdraw(self, release):
        if is_ours(read_file(self.path(release, '.conf')), release.app):
            remove_file(self.path(release, '.conf'))
        remove_file(self.path(release, '.override'))

    def state(self, release):
        _, out, err = self.host.ask(['status', release.app])
        text = (out or err).strip()
        match = re.search(r'(start|stop)/([\w-]+)(?:, process (\d+))?', text)
        if not match or match.group(1) == 'stop':
            return State(False, None, [], '', printable(text) or 'no such job')
        if match.group(2) != 'running':
            return State(None, None, [], '', text)
        identity = (match.group(3),)
        for found in running_containers(self.host, release.image):
            state = container_state(found)
            return state._replace(identity=identity + state.identity, text=text)
        images = [run.image for run in runs_of(job_of(release))]
        waits = any(is_image_of(release.app, image) for image in images)
        return State(None if waits else True, identity, [], '', text)

    def logs_command(self, release, lines, *follow):
        log = self.host.path(JOB_LOGS, release.app + '.log')
        return ('tail', '-n', lines) + follow + (log,)

def check_health(release, engine, timeout=HEALTH_TIMEOUT, steady=STEADY):
    """Wait until a release answers and keeps running; the moment of its first answer.
    Failure as soon as it is known that it will not.
    It answers when its HEALTHCHECK says healthy, or, without one, when each published tcp
    port accepts a connection at the container's own address (docker's proxy accepts on
    the host's port whatever is behind it)."""
    begun = since = monotonic()
    identity, deaths, answered = None, 0, None
    while True:
        state = engine.state(release)
        refuse_if(state.alive is False, 'it does not run: ' + state.text)
        refuse_if(state.health == 'unhealthy', 'its HEALTHCHECK says unhealthy')
        if state.identity != identity:
            deaths += identity is not None
            identity, since, answered = state.identity, monotonic(), None
        refuse_if(deaths > 3, 'it keeps dying and being started again')
        missing = silent_ports(state)
        if state.alive and not missing:
            answered = answered or monotonic()
            if monotonic() - since >= steady:
                return answered
        if monotonic() - begun > timeout:
            raise Failure('after %d s %s', timeout, missing or 'it is not running yet')
        time.sleep(0.1)

def silent_ports(state):
    """What does not answer yet, in words; '' when all does."""
    import socket
    if state.health not in ('', 'healthy'):
        return 'its HEALTHCHECK is still ' + state.health
    for address, port in [] if state.health else state.ports:
        try:
            socket.create_connection((address, port), 1).close()
        except (EnvironmentError, socket.error):
            return 'nothing listens on port %d of the container' % port
    return ''

# ---- Releases: the store, apply, deploy, recover ---------------------------------------

# number: counted from 1, never used again. time: of its push, in seconds since 1970.
# seconds: that the deploy took, None until it is through. failed: why it never was live,
# or None. image: its id. job, proxy: the files as they are installed, or None.
Release = namedtuple('Release', 'app number commit branch key time seconds failed image '
                     'job proxy')

def app_folder(host, app, *parts):
    return host.path(STATE, 'apps', app, *parts)

def release_folder(host, app, number):
    return app_folder(host, app, 'releases', str(number))

def list_apps(host):
    return list_folder(host.path(STATE, 'apps'))

def list_releases(host, app):
    """The numbers of an app's releases, failed ones included, as [int]."""
    names = list_folder(app_folder(host, app, 'releases'))
    return sorted(int(name) for name in names if name.isdigit())

def load_release(host, app, number):
    """A Release from the store; what is not written down of it yet is None."""
    import json
    folder = release_folder(host, app, number)
    found, unicode = json.loads(read_file(folder + '/release.json') or '{}'), type(u'')
    found.update(app=app, number=number, job=read_file(folder + '/upstart.conf'),
                 proxy=read_file(folder + '/nginx-proxy.conf'))
    values = [found.get(field) for field in Release._fields]
    return Release(*[to_text(to_bytes(value)) if isinstance(value, unicode) else value
                     for value in values])      # Python 2.7's json gives unicode

def kept_releases(host, app):
    """The releases that one can go back to, the one that was live last first."""
    times = [(os.stat(release_folder(host, app, number)).st_mtime, number)
             for number in list_releases(host, app)]
    found = [load_release(host, app, number) for _, number in sorted(times, reverse=True)]
    return [release for release in found if release.seconds is not None]

def save_release(host, release):
    """Write a release down whole: its record comes last."""
    import json
    folder = release_folder(host, release.app, release.number)
    make_folder(app_folder(host, release.app), 0o700)
    make_folder(folder)
    record = release._asdict()
    for path, text in ((folder + '/upstart.conf', record.pop('job')),
                       (folder + '/nginx-proxy.conf', record.pop('proxy'))):
        remove_file(temporary_of(path))
        remove_file(path) if text is None else replace_file(path, text)
    replace_file(folder + '/release.json',
                 json.dumps(record, indent=1, sort_keys=True) + '\n')

def linked_release(host, app, link):
    """The Release that `live` or `pending` points to, or None."""
    try:
        number = os.path.basename(os.readlink(app_folder(host, app, link)))
    except OSError:
        return None
    release = load_release(host, app, int(number))
    return release if release.commit else None

def live_release(host, app):
    return linked_release(host, app, 'live')

def set_link(host, app, link, release):
    replace_link(app_folder(host, app, link), 'releases/%d' % release.number)

def is_stopped(host, app):
    """Whether a person said `dockhand stop`; it lasts until a start or a push."""
    return os.path.exists(app_folder(host, app, 'stopped'))

@contextmanager
def app_lock(host, app, purpose):
    """Hold an app's lock, what a crash left put right; gives the live Release or None."""
    with locked(host.path(LOCKS, check_app_name(app)), purpose):
        recover_app(host, app)
        yield live_release(host, app)

@contextmanager
def live_app(host, app, command):
    """The same for a command that wants an app that is live."""
    with app_lock(host, app, 'dockhand %s %s' % (command, app)) as live:
        yield must_be_live(app, live)

def must_be_live(app, live):
    refuse_if(live is None, 'no app %s is live here: see dockhand apps', app)
    return live

def switch_steps(host, old, new, run=True, certain=False):
    """What makes the host go from one release to another, as functions in their order.
    old, new: a Release or None, in a first deploy, or its undoing; run, certain: whether
    the new one is started, and whether it was live before"""
    engine, app = choose_engine(host), (new or old).app
    latest = app + ':latest'
    proxy = partial(install_proxy, host, app, new and new.proxy, certain)
    stop = [partial(engine.stop, old)] if old else []
    if new is None:
        return stop + [proxy, partial(engine.withdraw, old),
                       partial(remove_image_tag, host, latest)]
    place = [partial(tag_image, host, image_tag(new), latest), partial(engine.place, new)]
    return stop + place + [proxy] + ([partial(engine.start, new)] if run else [])

def image_tag(release):
    return '%s:%s' % (release.app, release.number)

def apply(host, old, new):
    """Make the host match a release, or put the old one back and raise.
    The one place that changes a running app. `pending` says what is being switched to;
    moving `live` is the commit point. Gives what there is to report, in words."""
    engine, begun = choose_engine(host), monotonic()
    served = old and not is_stopped(host, new.app)
    if not old or new.proxy != old.proxy:       # others worked during the build
        check_proxy_change(host, new)
    engine.prepare(new)
    with undone_by(put_back, host, new, old):
        set_link(host, new.app, 'pending', new)
        stopped = monotonic()
        for act in switch_steps(host, old, new):
            act()
        switched = monotonic()
        answered = check_or_show_log(host, new, engine)
        checked = monotonic()
        set_link(host, new.app, 'live', new)
    finish(host, new, engine, new.seconds is not None)
    gap = ', down for %.1f s' % (answered - stopped) if served else ''
    return 'switched in %.1f s, checked in %.1f s%s' % (
        switched - begun, checked - switched, gap)

def finish(host, release, engine, follow):
    """What follows the commit point: the app comes back by itself from now on, and where
    git does not move the branch, as after a push, it follows."""
    app, branch = release.app, 'refs/heads/' + release.branch
    try:
        remove_file(app_folder(host, app, 'stopped'))
        engine.settle(release)
        if follow and has_history(host, app, release.commit):
            git(host, app, 'update-ref', branch, release.commit)
        if release.seconds is None:
            took = max(0, round(time.time() - release.time, 1))
            save_release(host, release._replace(seconds=took))
        os.utime(release_folder(host, app, release.number), None)
        pending = linked_release(host, app, 'pending')
        if pending and pending.number == release.number:
            remove_file(app_folder(host, app, 'pending'))
    except (Failure, EnvironmentError) as error:
        say('dockhand: %s is live, but: %s; `dockhand recover` tries again', app, error)

def check_or_show_log(host, release, engine):
    """The moment of a release's first answer; its log for the pusher if none comes."""
    try:
        return check_health(release, engine)
    except Failure as error:
        lines = []
        host.ask(engine.logs_command(release, str(LOG_LINES)), each=lines.append)
        step('The last lines of its log:' if any(lines) else 'It printed nothing')
        detail('\n'.join(lines))
        raise Failure('release %d failed its health check: %s', release.number, error)

def put_back(host, new, old):
    """Undo a switch, whatever was done of it. Each part that can be put back is."""
    engine, live = choose_engine(host), live_release(host, new.app)
    failed = 'could not be put back'
    if live and live.number == new.number:      # and it may be down since a power cut
        attempt(failed, engine.place, new)
        attempt(failed, engine.start, new)
        return finish(host, new, engine, True)
    run = old is not None and not is_stopped(host, new.app)
    steps = switch_steps(host, new, old, run, certain=True)
    if run:                     # a stop that was begun by a crashed command goes on
        steps = [partial(engine.stop, old)] + steps + [partial(engine.settle, old)]
    if not all([attempt(failed, act) for act in steps]):
        return say('dockhand: mend that, then: sudo dockhand recover')
    remove_file(app_folder(host, new.app, 'pending'))
    if run and attempt('release %d was started again, but' % old.number,
                       check_health, old, engine, HEALTH_TIMEOUT, 0):
        step('Release %d runs as before', old.number)

def sweep(host, app):
    """Remove the temporary files and the build folder of a command that was killed."""
    staged = [host.path(path) for path in staged_files(app)]
    links = [app_folder(host, app, name) for name in ('live', 'pending', 'stopped')]
    installed = [host.path(folder, app + ending) for folder in (JOBS, PROXIES)
                 for ending in ('.conf', '.override')]
    remove_file(repository(host, app) + '/index.lock')
    for path in staged + [temporary_of(path) for path in staged + links + installed]:
        remove_file(path)
    if os.path.isdir(build_folder(host, app)):
        empty_build_folder(host, app)
        remove_image_tag(host, app + ':plan')

def recover_app(host, app):
    """Finish or undo what a crash left of a deploy; under the app's lock."""
    sweep(host, app)
    pending, live = linked_release(host, app, 'pending'), live_release(host, app)
    if pending:
        step('%s: the switch to release %d was interrupted', app, pending.number)
        put_back(host, pending, live)
    for number in reversed(list_releases(host, app)):
        release = load_release(host, app, number)
        if release.seconds is not None or release.failed is not None:
            break
        forget(host, release, live, 'interrupted')
    if app in list_apps(host) and not list_releases(host, app):
        host.run(['rm', '-rf', '--', app_folder(host, app)])

def put_right(host, app):
    with app_lock(host, app, 'dockhand recover') as live:
        refuse_if(linked_release(host, app, 'pending'), 'it could not be put back')
        if live:
            bring_back(host, live)

def bring_back(host, live):
    """Bring back what is gone of a live release: tags, files, its container."""
    engine, app, number = choose_engine(host), live.app, live.number
    for tag in (image_tag(live), app + ':latest'):
        if [each['Id'] for each in inspect(host, tag)] != [live.image]:
            refuse_if(not inspect(host, live.image), 'the image of release %d is gone: '
                      'sudo dockhand rebuild %s', number, app)
            step('%s: tagging release %d as %s again', app, number, tag)
            tag_image(host, live.image, tag)
    if live.proxy and not os.path.exists(host.path(PROXIES, app + '.conf')):
        step('%s: installing its proxy file again', app)
        install_proxy(host, app, live.proxy, True)
    if is_stopped(host, app):
        return engine.stop(live)
    if engine.revives(live):
        if engine.state(live).alive is False:
            step('%s: release %d did not run; starting it', app, number)
            engine.place(live)
            engine.start(live)
        engine.settle(live)

def installed_files(host, release):
    """[(name in the repository, path on the host, text)] of what a release installs."""
    files = [('nginx-proxy.conf', PROXIES, release.proxy)]
    files += [('upstart.conf', JOBS, release.job)] if is_upstart(host) else []
    return [(name, '%s/%s.conf' % (folder, release.app), text)
            for name, folder, text in files if text is not None]

def read_pushed(folder, name):
    """The text of a pushed file, None where there is none; Failure unless it is plain."""
    path = os.path.join(folder, name)
    try:
        kind = os.lstat(path).st_mode
    except OSError:
        return None
    if not stat.S_ISREG(kind):
        found = 'link' if stat.S_ISLNK(kind) else 'folder'
        raise Failure('%s is a %s: commit a plain file', name, found)
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), 'rb') as source:
        data = source.read(FILE_LIMIT + 1)
    refuse_if(len(data) > FILE_LIMIT, '%s is larger than %d KB', name, FILE_LIMIT // 1024)
    refuse_if(b'\0' in data, '%s holds a NUL byte: it is no text', name)
    refuse_if(data.startswith(b'\xef\xbb\xbf') and name.endswith('.conf'), '%s:1: begins '
              'with a byte order mark: save it as UTF-8 without one', name)
    refuse_if(not data.strip() and not name.startswith('.'), '%s is empty', name)
    return to_text(data)

def repository(host, app):
    return host.path(host.home(), app + '.git')

def git(host, app, *args, **options):
    """Run git in an app's repository, as the git user only; what it prints."""
    command = ['git', '--git-dir=' + repository(host, app)] + list(args)
    return options.get('act', host.run)(command, account=host.account())

def commit_of(host, app, ref):
    """The id of the commit a ref points to, '' where there is none."""
    return git(host, app, 'for-each-ref', '--format=%(objectname)', ref).strip()

def build_folder(host, app):
    return host.path(STATE, 'build', app)

def check_out(host, app, commit):
    """Fill the app's build folder with a commit's files; the folder."""
    folder = build_folder(host, app)
    empty_build_folder(host, app)
    host.run(['mkdir', folder], account=host.account())
    git(host, app, 'read-tree', commit)
    git(host, app, '--work-tree=' + folder, 'checkout-index', '-a')
    return folder

def empty_build_folder(host, app):
    host.run(['rm', '-rf', '--', build_folder(host, app)], account=host.account())

def check_files(release, folder):
    """The Release with its job and proxy file, as they are installed; Failure by line."""
    app, read = release.app, partial(read_pushed, folder)
    if read('Dockerfile') is None:
        raise Failure('no Dockerfile in this commit: it says how to build the app')
    read('.dockerignore')
    job, proxy = read('upstart.conf'), read('nginx-proxy.conf')
    refuse_if(job is None, 'no upstart.conf in this commit: it says how to run the app, '
              'as in `exec docker run --rm %s`', app)
    if os.path.lexists(os.path.join(folder, '.gitmodules')):
        step('Note: submodules are not part of a push; their folders are empty')
    if 'filter=lfs' in (read('.gitattributes') or ''):
        step('Note: files kept by git LFS are not part of a push; their pointers are')
    job, old_words = modernize_job(job)
    if old_words:
        step('Written with two dashes, for docker of today: ' + ' '.join(old_words))
    check_job(parse_job(job), app)
    return release._replace(job=headed(app, 'job', job),
                            proxy=proxy and headed(app, 'proxy file', proxy))

def check_host_names(host, app):
    """Failure where the server has something of that name that dockhand did not write."""
    if app in list_apps(host):
        return
    for path in ['/etc/init.d/' + app] + [unit + '/%s.service' % app for unit in UNITS]:
        refuse_if(os.path.exists(host.path(path)),
                  '"%s" is a service of this server (%s): choose another name', app, path)
    for path in [folder + '/%s.conf' % app for folder in (JOBS, PROXIES)]:
        text = read_file(host.path(path))
        refuse_if(text and not is_ours(text, app), '%s is on this server already, and '
                  "not dockhand's: rename the app, or the file", path)

def edited_files(host, live, new=None):
    """[(name, path, live text, text found)] of what was changed by hand on the host.
    A file that is as a new Release on its way says counts as unchanged."""
    to_be = [text for _, _, text in installed_files(host, new or live)]
    found = [(name, path, text, read_file(host.path(path)))
             for name, path, text in installed_files(host, live)]
    return [each for each in found if each[3] not in [None, each[2]] + to_be]

def check_edited(host, live, release):
    for name, path, ours, text in edited_files(host, live, release):
        step('%s was changed on the server:', path)
        detail(diff_text(ours, text, 'as pushed', 'on the server'))
        raise Failure('to keep that, commit it in %s and push; to drop it: sudo rm %s, '
                      'and try again', name, path)

def diff_text(old, new, old_name, new_name):
    import difflib
    return '\n'.join(line.rstrip('\r\n') for line in difflib.unified_diff(
        old.splitlines(), new.splitlines(), old_name, new_name, lineterm=''))

def deploy(host, app, key, ref, old, new):
    """Decide about one pushed ref and deploy it; Failure refuses it."""
    with app_lock(host, app, 'a push of %s by %s' % (app, key)) as live:
        there = [] if live else [each for each in DEFAULT_BRANCHES
                                 if commit_of(host, app, 'refs/heads/' + each)]
        verdict = judge_ref(ref, new, live.branch if live else (there + [None])[0])
        if verdict == 'store' or verdict == 'deploy' and live and live.commit == new:
            return
        branch = ref[len('refs/heads/'):]
        if verdict == 'plan':
            plan_release(host, live, new_release(host, app, key, branch, new, 'plan'))
        check_race(host, app, live, branch, old)
        make_release(host, live, new_release(host, app, key, branch, new))

def check_race(host, app, live, branch, old):
    """Failure where the branch is no longer what the pusher saw.
    git moves the branch of a push that has just gone live in a moment; where that does
    not come, a crash came between, and the branch is set to what is live."""
    ref, deadline = 'refs/heads/' + branch, monotonic() + 3
    found = wanted = commit_of(host, app, ref)
    if live and live.commit != found and has_history(host, app, live.commit):
        wanted = live.commit
    while found != wanted:
        time.sleep(0.05)
        if monotonic() > deadline:
            remove_file(os.path.join(repository(host, app), ref + '.lock'))
            git(host, app, 'update-ref', ref, wanted)
        found = commit_of(host, app, ref)
    if found != (old if old.strip('0') else ''):
        raise Failure('another push went live: pull, then push again')

def has_history(host, app, commit):
    """Whether git has a commit and its parents; a killed shallow push leaves it alone."""
    return not git(host, app, 'rev-list', '--quiet', commit, act=host.ask).status

def new_release(host, app, key, branch, commit, number=None):
    """The next Release of an app, as far as it is known before the build."""
    number = number or (list_releases(host, app) or [0])[-1] + 1
    return Release(app, number, commit, branch, key, round(time.time(), 2), *[None] * 5)

def make_release(host, live, release, options=()):
    """Check, build and apply a new release; Failure leaves everything as it was."""
    check_space(host)
    check_free(host, live, release)
    begun, app, free = monotonic(), release.app, free_bytes(host, images_folder(host))
    with undone_by(forget, host, release, live):
        save_release(host, release)
        release = build_release(host, live, release, options)
        git(host, app, 'update-ref', commit_ref(release), release.commit)
        save_release(host, release)
        built, number = monotonic() - begun, release.number
        step('Switching to release %d', number)
        report = apply(host, live, release)
    step('Release %d is live: built in %.1f s, %s', number, built, report)
    more = free - free_bytes(host, images_folder(host))
    detail('disk: %.1f MB %s', abs(more) / 1e6, 'more' if more > 0 else 'less')
    log('%s: release %d of %s by %s is live', app, number, release.commit, release.key)

def commit_ref(release):
    """A ref that is not advertised: git keeps the commit that one can go back to."""
    return 'refs/dockhand/%d' % release.number

def plan_release(host, live, release):
    try:
        show_plan(host, live, build_release(host, live, release))
    finally:
        remove_image_tag(host, image_tag(release))
    raise Failure('this was a plan, nothing has changed; to deploy it: git push REMOTE '
                  'HEAD:%s', live.branch if live else DEFAULT_BRANCHES[0])

def check_free(host, live, release):
    """Failure where docker has something of a name that this release needs."""
    check_host_names(host, release.app)
    names = [image_tag(release), container_name(release)]
    names += [] if live else [release.app + ':latest']
    for name in names if inspect(host, *names) else []:
        if inspect(host, name):
            verb = 'rm' if '--' in name else 'rmi'
            raise Failure('docker has %s already, and not from dockhand: rename the app, '
                          'or docker %s %s', name, verb, name)

def build_release(host, live, release, options=()):
    """The Release with its image built, and all checked that can be before a switch."""
    layers = []
    step('Checking %s', release.commit[:10])
    try:
        folder = check_out(host, release.app, release.commit)
        release = check_files(release, folder)
        choose_engine(host).check(release)
        if live:
            check_edited(host, live, release)
        check_proxy_change(host, release)
        step('Building %s', image_tag(release))
        build_image(host, folder, image_tag(release), layers, *options)
    except (Failure, Stopped):
        if layers and release.number != 'plan':
            save_release(host, release._replace(image=layers[-1]))
        raise
    finally:
        empty_build_folder(host, release.app)
    images = inspect(host, image_tag(release))
    refuse_if(not images, 'the build left no image %s in docker: does `docker buildx` '
              'use a builder elsewhere?', image_tag(release))
    declared = (images[0].get('Config') or {}).get('Volumes') or {}
    volumes = [to_text(to_bytes(path)) for path in declared]
    ports = proxied_ports(release.proxy)
    for line, text in check_job(job_of(release), release.app, ports, volumes):
        if 'under Upstart' not in text or is_upstart(host):
            step('upstart.conf:%d: %s', line, text)
    return release._replace(image=str(images[0]['Id']))

def check_proxy_change(host, release):
    if release.proxy:
        with host_lock(host, release.app):
            check_proxy_file(host, release.app, release.proxy)

def forget(host, release, live, reason=None):
    """Clean up after a release that did not become live: its number and why remain."""
    app, now = release.app, live_release(host, release.app)
    if linked_release(host, app, 'pending') or now and now.number == release.number:
        return
    try:
        drop(host, release, '--no-prune')       # the mended push builds on what is there
    except Failure:
        return                                  # docker has gone: a later command does
    if live is None:
        host.run(['rm', '-rf', '--', app_folder(host, app)])
    elif release.commit is None:                # killed before it was written down
        host.run(['rm', '-rf', '--', release_folder(host, app, release.number)])
    else:
        why = printable(reason or str(sys.exc_info()[1]), 300)
        found = load_release(host, app, release.number)
        save_release(host, found._replace(failed=why, job=None, proxy=None))

def drop(host, release, *options):
    """Take away what a release has outside the store: container, image tag, commit.
    False where the image stays, since somebody's container uses it."""
    on_container(host, release, 'rm', '-f', '-v')
    gone = remove_image_tag(host, image_tag(release), *options)
    if gone:
        git(host, release.app, 'update-ref', '-d', commit_ref(release), act=host.ask)
    return gone

def clean_up(host, live):
    """Remove what is older than the last releases; only what the store names is ours."""
    app, numbers = live.app, list_releases(host, live.app)
    if linked_release(host, app, 'pending'):
        return
    others = [each for each in kept_releases(host, app) if each.number != live.number]
    kept = [each.number for each in others[:KEPT - 1] + [live]]
    for release in [load_release(host, app, number) for number in numbers]:
        if release.failed and release.image:    # it was left as a cache for this release
            if not any(each.get('RepoTags') for each in inspect(host, release.image)):
                host.ask(['docker', 'rmi', release.image])
            save_release(host, release._replace(image=None))
        if release.number not in kept and (
                not release.failed or release.number in numbers[:-LISTED]):
            remove_release(host, release)

def remove_release(host, release):
    """Remove an old release, but not the image of somebody's container."""
    images, number = images_folder(host), release.number
    free, written = free_bytes(host, images), written_files(host, container_name(release))
    if not drop(host, release):
        return step('Release %d stays: a container uses its image', number)
    host.run(['rm', '-rf', '--', release_folder(host, release.app, number)])
    freed = max(0, free_bytes(host, images) - free) / 1e6
    step('Release %d is removed, %.1f MB freed', number, freed)
    if written:
        detail('with what its container wrote outside volumes: %s%s',
               ', '.join(written[:5]), ' ...' if written[5:] else '')

def show_plan(host, live, release):
    step('What a push of this would change:')
    for name, old, new in (('upstart.conf', live and live.job, release.job),
                           ('nginx-proxy.conf', live and live.proxy, release.proxy)):
        diff = diff_text(old or '', new or '', 'live/' + name, 'new/' + name)
        detail(diff or name + ': no change')
    was, now = ports_text(live), ports_text(release)
    same = ', as it is live' if live and live.image == release.image else ''
    size = inspect(host, image_tag(release))[0]['Size'] / 1e6
    gap = 'one stop and one start of the service' if live else 'none, it is new'
    detail('ports: %s', now if was == now else '%s, now %s' % (now, was))
    detail('image: %s (%.1f MB)%s', release.image[:19], size, same)
    detail('gap: %s\nspace: %.0f MB free', gap, free_bytes(host, STATE) / 1e6)

def ports_text(release):
    ports = published_ports(job_of(release)) if release else []
    return ', '.join('%s%s -> %s/%s' % (each.address and each.address + ':',
                                        each.host or 'any', each.container, each.protocol)
                     for each in ports) or 'none'

def address_text(release):
    address = release.proxy and proxy_address(servers_of(release.proxy))
    return address or 'ports ' + ports_text(release)

def show_address(host, release):
    """Tell where an app answers; a web app's address is fetched through nginx first."""
    app, address = release.app, address_text(release)
    match = re.match(r'http://([^:/]+):?(\d*)/', address)
    if not match:
        return step('%s: %s', app, address)
    name, port = match.groups()
    status, own = fetch_status(name, int(port or 80)), host.ask(['hostname', '-I']).out
    hosts = host.ask(['timeout', '2', 'getent', 'ahosts', name])
    found = re.findall(r'(?m)^\S+', hosts.out)
    if set(found) & set(own.split()):
        return step('%s: %s answers %s', app, address, status)
    route = host.ask(['timeout', '2', 'ip', 'route', 'get', '192.0.2.1']).out
    here = (re.findall(r'src (\S+)', route) + [os.uname()[1]])[0] + (port and ':' + port)
    step("%s answers %s: curl -H 'Host: %s' http://%s/", app, status, name, here)
    detail('%s leads %s: point it here in DNS, or take every name with '
           '`listen 80 default_server;`', name, 'to %s, which may be this server or not'
           % found[0] if found else 'nowhere yet')

def fetch_status(name, port):
    """What nginx on this machine answers to a request for a host name: `200`."""
    import socket
    request = 'GET / HTTP/1.0\r\nHost: %s\r\n\r\n' % name
    try:
        connection = socket.create_connection(('127.0.0.1', port), 5)
        connection.sendall(to_bytes(request))
        answer = to_text(connection.makefile('rb').readline(100))
        connection.close()
    except (EnvironmentError, socket.error) as error:
        return 'nothing (%s)' % error
    return (answer.split() + ['', 'nothing'])[1]

# ---- Receiving: serve and the two hooks ------------------------------------------------

def serve(host, name, *apps):
    """Run by sshd for a key, as the git user: hand a push, clone or fetch over to git."""
    verb, app = parse_ssh_command(os.environ.get('SSH_ORIGINAL_COMMAND', ''))
    refuse_if(apps and app not in apps, 'the key "%s" has no right to %s: it may reach '
              '%s', name, app, ', '.join(apps))
    folder = repository(host, app)
    if not os.path.isdir(folder):
        refuse_if(verb == 'upload-pack', 'no app %s here; a first push makes it', app)
        check_host_names(host, app)
        make_repository(host, app, folder)
    kept = ('PATH', 'HOME', 'USER', 'LOGNAME', 'LANG', 'SSH_CONNECTION', 'GIT_PROTOCOL')
    env = dict((word, os.environ[word]) for word in kept if word in os.environ)
    env.update(DOCKHAND_APP=app, DOCKHAND_KEY=name)
    os.execvpe('git', ['git', verb, folder], env)

def make_repository(host, app, folder):
    """A bare repository with our hooks, there whole or not at all."""
    home = os.path.dirname(folder)
    temporary = os.path.join(home, '.%s.%d' % (app, os.getpid()))
    host.run(['git', '-c', 'init.defaultBranch=main', 'init', '-q', '--bare',
              '--template=' + host.path(TEMPLATE), temporary], cwd=home)
    try:
        os.rename(temporary, folder)
    except OSError:                         # another first push was faster
        host.run(['rm', '-rf', '--', temporary])

def receive(host, hook, app='', key='', *ref):
    """Run as root by a repository's hooks: sudo receive update|post-receive|check."""
    if hook == 'check':
        return
    refuse_if('' in (app, key), 'push over ssh, with a key of your own: git@HOST:APP.git')
    check_app_name(app)
    check_key_name(key)
    if hook == 'update' and len(ref) == 3 and all(map(OBJECT_ID.match, ref[1:])):
        deploy(host, app, key, *ref)
    elif hook == 'post-receive' and not ref:
        after_push(host, app)
    else:
        raise Failure('this is for the hooks of a repository')

def after_push(host, app):
    """Once the branch has moved: say where the app answers, remove what is too old.
    Nothing depends on it, since it does not run when the pusher is gone."""
    live = live_release(host, app)
    if live:
        git(host, app, 'symbolic-ref', 'HEAD', 'refs/heads/' + live.branch)
        show_address(host, live)
        with app_lock(host, app, 'the clean-up of ' + app) as live:
            if live:
                clean_up(host, live)

def hang_up(host):
    """End git's process for a pusher who takes nothing any more, or it waits for ever.
    The deploy is over; the same push again is accepted, and moves the branch."""
    from termios import FIONREAD
    pid, unread = os.getppid(), fcntl.ioctl(2, FIONREAD, b'none')
    time.sleep(2 * PATIENCE)
    if fcntl.ioctl(2, FIONREAD, b'none') == unread != b'\0\0\0\0':
        while pid > 1 and 'receive-pack' not in host.text('/proc', str(pid), 'cmdline'):
            stats = host.text('/proc', str(pid), 'stat').rpartition(')')[2].split()
            pid = int((stats + [0, 0])[1])
        if pid > 1:
            os.kill(pid, signal.SIGTERM)

# ---- Installing: what dockhand puts on a machine, and whether it is there --------------

def installed_parts(host):
    """Every file that `install` writes, but for nginx's, as [(path, text, mode)].
    The launchers are for the interpreter that runs now, isolated. They neither collect
    garbage nor take the interpreter down: 7 of a start's 30 ms."""
    source = read_file(os.path.abspath(__file__).replace('.pyc', '.py'))
    launcher = partial(LAUNCHER.format, python=sys.executable, library=LIBRARY,
                       flags='-Es' if PYTHON_2 else '-IS', user=host.user)
    parts = [
        (LIBRARY + '/dockhand.py', source, 0o644),
        (PROGRAM, launcher(role='dockhand'), 0o755),
        (RECEIVE, launcher(role='receive'), 0o755),
        (TEMPLATE + '/config', REPOSITORY_CONFIG, 0o644),
        (SUDOERS, '%s ALL=(root) NOPASSWD: %s\n' % (host.user, RECEIVE), 0o440)]
    if is_systemd(host):
        parts.append((UNIT, UNIT_TEXT.format(program=PROGRAM), 0o644))
    elif is_upstart(host):
        parts.append((BOOT_JOB, BOOT_JOB_TEXT.format(program=PROGRAM), 0o644))
    folders = ['%s/%s.git' % (host.home(), app) for app in list_apps(host)]
    folders = [TEMPLATE] + [each for each in folders if os.path.isdir(host.path(each))]
    return parts + [(folder + '/hooks/' + name, text, 0o755)
                    for folder in folders for name, text in HOOKS]

PACKAGES = (('git', 'git'), ('docker', 'docker.io'), ('nginx', 'nginx'),
            ('sshd', 'openssh-server'), ('ssh-keygen', 'openssh-client'),
            ('sudo', 'sudo'), ('visudo', 'sudo'), ('useradd', 'passwd'))

def missing_requirements(host):
    """[(what is missing, the command that brings it)]."""
    found = [(name, 'apt-get install ' + package) for name, package in PACKAGES
             if not host.ask(['which', name]).out.strip()]
    docker, bring = host.ask(['which', 'docker']).out.strip(), 'apt-get install docker.io'
    if docker and os.path.realpath(docker).startswith('/snap'):
        found.append(('docker, but not from a snap (it cannot read /var/lib)',
                      'snap remove docker; ' + bring))
    elif docker and 'podman' in ' '.join(host.ask(['docker', 'version'])[1:]).lower():
        found.append(('docker itself, not podman', bring))
    elif docker:
        try:
            if docker_version(host) < (1, 11) and not is_upstart(host):
                found.append(('docker 1.11 or later, where init is not Upstart', bring))
        except Failure as failure:
            found.append((str(failure), 'service docker start || dockerd &'))
    return found

def ensure_user(host):
    """The git user; True if it was made or changed."""
    account, user = host.account(), host.user
    if account is None:
        argv, said = 'useradd -m -d /home/%s -s /bin/sh -p *' % user, 'made the user %s'
    elif account.shell.endswith(('nologin', 'git-shell', 'false')) or account.uid == 0:
        raise Failure("the user %s is somebody else's (its shell is %s): dockhand.py "
                      'install --user NAME takes another', account.name, account.shell)
    elif re.search(r'(?m)^%s:!' % re.escape(user), host.text('/etc/shadow')):
        argv, said = 'usermod -p *', 'unlocked the user %s for keys (no password works)'
    else:
        return False
    host.run(argv.split() + [user])
    tell(said, user)
    return True

def install_part(host, name, text, mode):
    """Write a file, the git user's under its home; True if it changed."""
    path, visudo = host.path(name), ['visudo', '-c', '-q', '-f']
    if not os.path.isdir(os.path.dirname(path)):
        make_folder(os.path.dirname(path))
    owner = host.account() if name.startswith(host.home() + '/') else None
    check = (lambda new: host.run(visudo + [new])) if name == SUDOERS else None
    changed = replace_file(path, text, mode, owner, check)
    if changed:
        tell('wrote ' + name)
    return changed

def disable_default_site(host):
    """Move the distribution's default site, which claims `default_server`, out of the way
    if it is as its package brought it, by dpkg's own checksum."""
    import hashlib
    query = ['dpkg-query', '-W', '-f', '${Conffiles}\n', 'nginx*']
    for site, packaged in ((NGINX + '/sites-enabled/default', '/sites-available/default'),
                           (PROXIES + '/default.conf', '/conf.d/default.conf')):
        text, left = host.text(site), NGINX + packaged + '.disabled'
        known = '%s%s %s' % (NGINX, packaged, hashlib.md5(to_bytes(text)).hexdigest())
        if text and known in host.ask(query).out:
            os.rename(host.path(site), host.path(left))
            tell("disabled nginx's default site: it is %s now", left)
            return True
    return False

def install_nginx(host):
    """The catch-all, tested before it is in place; True if something changed."""
    changed = disable_default_site(host)
    if not os.path.exists(host.path(CATCH_ALL)):
        problem = try_nginx(host, '000-dockhand', None)
        refuse_if(problem, "nginx's configuration is broken, mend it first: %s", problem)
    changed = write_catch_all(host) or changed
    if changed or nginx_master(host) is None:
        reload_nginx(host)
    return changed

def check_sudo(host):
    """Run the one command as the git user, as a hook will."""
    result = host.ask(['sudo', '-n', RECEIVE, 'check'], account=host.account())
    refuse_if(result.status, 'the user %s cannot run %s by sudo (%s): /etc/sudoers must '
        'have `#includedir /etc/sudoers.d`', host.user, RECEIVE, last_line(result.err))

# ---- Commands --------------------------------------------------------------------------

def install(host, user=None):
    """make this machine ready, or bring it up to date"""
    import py_compile
    if user:
        host.user = check_app_name(user) if user != 'git' else user
    missing = missing_requirements(host)
    for what, command in missing:
        tell('missing: %s\n         to bring it: %s', what, command)
    refuse_if(missing, '%d requirement(s) missing, nothing was changed', len(missing))
    changes = [ensure_user(host),
               make_folder(host.path(STATE)), make_folder(host.path(STATE, 'apps')),
               make_folder(host.path(STATE, 'build'), 0o700, host.account())]
    changes += [install_part(host, *part) for part in installed_parts(host)]
    script = LIBRARY + '/dockhand.py'   # compiled, a start costs the same at any length
    py_compile.compile(host.path(script), dfile=script, doraise=True)
    changes += [replace_link(host.path(OLDER_NAME), PROGRAM), install_nginx(host)]
    if is_systemd(host):                # what `systemctl enable` does
        wants = host.path('/etc/systemd/system/multi-user.target.wants')
        make_folder(wants)
        changes.append(replace_link(wants + '/dockhand-recover.service', UNIT))
    check_sudo(host)
    tell('dockhand is installed; next: cat ~/.ssh/id_ed25519.pub | ssh THIS-HOST '
         '"sudo dockhand upload-key NAME"' if any(changes) else 'nothing changed')

def write_keys(host, before, keys, after):
    account, path = host.account(), host.path(host.home(), KEYS)
    make_folder(os.path.dirname(path), 0o700, account)
    return replace_file(path, render_authorized_keys(before, keys, after), 0o600, account)

def upload_key(host, name, *apps):
    """let the public keys on standard input push (to these apps only)"""
    check_key_name(name)
    for app in apps:
        check_app_name(app)
    source = sys.stdin if PYTHON_2 else sys.stdin.buffer
    text = '' if source.isatty() else to_text(source.read(FILE_LIMIT + 1))
    if len(text) > FILE_LIMIT:
        raise Failure('this is no key file: it is larger than %d KB', FILE_LIMIT // 1024)
    uploaded = parse_public_keys(text)
    for kind, blob in uploaded:
        check_key_type(host, kind, blob)
    refuse_if(not host.account(), 'dockhand is not installed here: dockhand.py install')
    with locked(host.path(LOCKS, '.keys'), 'a change of keys'):
        before, keys, after = split_authorized_keys(host.text(host.home(), KEYS))
        changed = write_keys(host, before, add_keys(keys, uploaded, name, apps), after)
    where = ', '.join(apps) or 'every app'
    for kind, blob in uploaded:
        tell('%s %s %s may push %s', name, kind, fingerprint(blob), where)
    log('key %s: may push %s', name, where)
    if not changed:
        tell('nothing changed')

def check_key_type(host, kind, blob):
    """This server's own ssh-keygen decides whether its sshd will know the key."""
    import tempfile
    with tempfile.NamedTemporaryFile(suffix='.pub') as file:
        file.write(to_bytes('%s %s\n' % (kind, blob)))
        file.flush()
        if host.ask(['ssh-keygen', '-l', '-f', file.name]).status:
            raise Failure("this server's OpenSSH knows no %s keys like this: make one "
                          'with ssh-keygen -t ecdsa', printable(kind))

def list_keys(host):
    """list who may push, and which apps"""
    for key in split_authorized_keys(host.text(host.home(), KEYS))[1]:
        where = ' '.join(key.apps) or '(every app)'
        tell('%-20s %-20s %s %s', key.name, key.type, fingerprint(key.blob), where)

def remove_key(host, name):
    """take the right to push away from a key"""
    with locked(host.path(LOCKS, '.keys'), 'a change of keys'):
        before, keys, after = split_authorized_keys(host.text(host.home(), KEYS))
        kept = [key for key in keys if key.name != name]
        if kept == keys:
            raise Failure('no key is named "%s": see dockhand keys', printable(name))
        write_keys(host, before, kept, after)
    log('key %s: removed', name)
    tell('%s may push no longer', name)

def apps(host):
    """list the apps: state, commit, since when, by whom, address"""
    engine = choose_engine(host)
    repositories = [name[:-4] for name in list_folder(host.path(host.home()))
                    if name.endswith('.git')]
    names = sorted(set(list_apps(host) + repositories))
    if not names:
        tell('no apps yet')
    for app in names:
        live = live_release(host, app)
        if live:
            alive = engine.state(live).alive
            state = 'running' if alive else 'stopped' if is_stopped(host, app) else 'DOWN'
            tell('%-16s %-8s %s %s', app, state, origin_text(live), address_text(live))
        else:
            tell('%-16s not live', app)

def logs(host, app, n='100', f=False):
    """show what an app prints; -f goes on, -n N shows the last N lines"""
    refuse_if(not n.isdigit(), '-n wants a number')
    live = must_be_live(app, live_release(host, check_app_name(app)))
    command = choose_engine(host).logs_command(live, n, *['-f'] if f else [])
    os.execvpe(command[0], command, dict(os.environ, **ENVIRONMENT))

def restart(host, app):
    """stop an app and start it again"""
    with live_app(host, app, 'restart') as live:
        choose_engine(host).stop(live)
    start(host, app)

def start(host, app):
    """start an app that was stopped"""
    with live_app(host, app, 'start') as live:
        engine = choose_engine(host)
        engine.place(live)
        engine.start(live)
        check_or_show_log(host, live, engine)
        finish(host, live, engine, True)
    tell('%s runs', app)

def stop(host, app):
    """stop an app; it stays so over a reboot, until a start or a push"""
    with live_app(host, app, 'stop') as live:
        replace_file(app_folder(host, app, 'stopped'), '')
        choose_engine(host).stop(live)
    tell('%s is stopped', app)

def rebuild(host, app, pull=False):
    """build the live commit again as a new release; --pull fetches newer base images"""
    with live_app(host, app, 'rebuild') as live:
        release = new_release(host, app, live.key, live.branch, live.commit)
        make_release(host, live, release, ['--pull'] if pull else [])
        release = live_release(host, app)
        clean_up(host, release)
    show_address(host, release)

def releases(host, app):
    """list an app's releases: commit, when, by whom, how long it took, live or not"""
    if app not in list_apps(host):
        raise Failure('no app %s here: see dockhand apps', printable(app))
    live = live_release(host, app)
    found = [load_release(host, app, number) for number in list_releases(host, app)]
    for release in [each for each in reversed(found) if each.commit]:
        state = 'live' if live and live.number == release.number else (
            'failed: ' + release.failed if release.failed else
            'kept' if release.seconds is not None else 'under way')
        took = '-' if release.seconds is None else '%.1f s' % release.seconds
        tell('%4d  %s %8s  %s', release.number, origin_text(release), took, state)

def origin_text(release):
    since = time.strftime('%Y-%m-%d %H:%M', time.localtime(release.time))
    return '%s  %s  %-10s' % (release.commit[:10], since, release.key)

def rollback(host, app, number=None):
    """go back to the release that was live before, or to another that is kept"""
    with live_app(host, app, 'rollback') as live:
        release = earlier_release(host, live, number)
        check_edited(host, live, release)
        was, now = live.number, release.number
        step('Switching from release %d to %d', was, now)
        step('Release %d is live again: %s', now, apply(host, live, release))
        log('%s: rolled back from release %d to %d of %s', app, was, now, release.commit)
    show_address(host, release)

def earlier_release(host, live, number):
    """The kept Release that a rollback goes to; Failure if it cannot run any more."""
    found = [each for each in kept_releases(host, live.app)
             if each.number != live.number and number in (None, str(each.number))]
    if not found:
        raise Failure('release %s is not one to go back to: see dockhand releases %s',
                      printable(number or 'before %d' % live.number), live.app)
    tag = image_tag(found[0])
    if [each['Id'] for each in inspect(host, tag)] != [found[0].image]:
        raise Failure('release %d cannot run again: its image %s was removed; nothing '
                      'has changed', found[0].number, tag)
    return found[0]

def recover(host):
    """put right what a crash or a prune left; runs at boot"""
    free_ports(host)
    apps = sorted(set(list_apps(host) + list_folder(host.path(STATE, 'build'))))
    wrong = [app for app in apps if not attempt(app, put_right, host, app)]
    refuse_if(wrong, '%d app(s) could not be put right', len(wrong))

def destroy(host, app, force=False):
    """remove an app: its containers, images, files and repository"""
    check_app_name(app)
    if app not in list_apps(host) and not os.path.isdir(repository(host, app)):
        raise Failure('no app %s here: see dockhand apps', app)
    refuse_if(not force, 'this removes %s and its repository for good; if you are sure: '
              'dockhand destroy %s --force', app, app)
    with app_lock(host, app, 'dockhand destroy ' + app) as live:
        for act in switch_steps(host, live, None) if live else []:
            act()
        for link in ('live', 'pending'):
            remove_file(app_folder(host, app, link))
        for number in list_releases(host, app):
            drop(host, load_release(host, app, number))
        remove_image_tag(host, app + ':plan')
        host.run(['rm', '-rf', '--', app_folder(host, app), repository(host, app)])
    tell('%s is removed', app)

def doctor(host):
    """check every part of the installation, and say what to type"""
    checks = missing_requirements(host)
    for part in () if checks else (doctor_parts, doctor_ssh, doctor_nginx, doctor_apps):
        checks += part(host)
    for what, command in checks:
        tell('WRONG  %s\n       type: %s', what, command)
    refuse_if(checks, '%d thing(s) to mend', len(checks))
    tell('all is well')

def doctor_parts(host):
    if host.account() is None:
        yield 'there is no user ' + host.user, INSTALL_AGAIN
        return
    for path, text, _ in installed_parts(host):
        if host.text(path) != text:
            yield path + ' is not as installed', INSTALL_AGAIN
    try:
        check_sudo(host)
    except Failure as failure:
        yield str(failure), 'visudo'

def doctor_ssh(host):
    said, named = host.ask(['sshd', '-T']).out, '(?:^|[ /])%s(?: |$)'
    for option, wanted in (('AllowUsers', host.user), ('AllowGroups', host.user),
                           ('AuthorizedKeysFile', KEYS)):
        found = ' '.join(re.findall('(?im)^%s (.*)' % option, said))
        if found and not re.search(named % re.escape(wanted), found):
            yield ('%s of sshd is %s, without %s' % (option, found, wanted),
                   'edit /etc/ssh/sshd_config, then reload ssh')
    if not host.text(host.home(), KEYS):
        yield 'no key may push', 'dockhand upload-key NAME < id_ed25519.pub'

def doctor_nginx(host):
    result = host.ask(['nginx', '-t', '-q'])
    if result.status:
        yield nginx_error(result.err), 'edit that file, then nginx -t'
    elif nginx_master(host) is None:
        yield 'nginx does not run', 'service nginx start'
    elif host.text(CATCH_ALL) != catch_all_text(host, proxy_files(host)):
        yield CATCH_ALL + ' is not as it should be', INSTALL_AGAIN

def doctor_apps(host):
    engine = choose_engine(host)
    for app in list_apps(host):
        live = live_release(host, app)
        if linked_release(host, app, 'pending'):
            yield 'a deploy of %s was interrupted' % app, 'sudo dockhand recover'
        elif live and not inspect(host, image_tag(live)):
            yield 'the image of %s is gone' % app, 'sudo dockhand rebuild ' + app
        elif live and not is_stopped(host, app) and not engine.state(live).alive:
            yield app + ' does not run', 'sudo dockhand start ' + app

# The words after each name: [X] may be left out, [-x] is a flag, [-x Y] takes a value.
COMMANDS = [
    ('install', install, '[--user NAME]'), ('upload-key', upload_key, 'NAME [APP...]'),
    ('keys', list_keys, ''), ('remove-key', remove_key, 'NAME'),
    ('apps', apps, ''), ('logs', logs, 'APP [-f] [-n N]'),
    ('restart', restart, 'APP'), ('stop', stop, 'APP'), ('start', start, 'APP'),
    ('releases', releases, 'APP'), ('rollback', rollback, 'APP [N]'),
    ('rebuild', rebuild, 'APP [--pull]'), ('destroy', destroy, 'APP [--force]'),
    ('recover', recover, ''), ('doctor', doctor, '')]

def parse_arguments(pattern, words):
    """(positional words, {option: value}) by a pattern of the command table; or Usage."""
    from getopt import GetoptError, gnu_getopt
    known = re.findall(r'\[--?([a-z]+)( [A-Z]+)?\]', pattern)
    short = ''.join(name + (value and ':') for name, value in known if len(name) == 1)
    longer = [name + (value and '=') for name, value in known if len(name) > 1]
    least = re.sub(r'\[.*?\]', '', pattern).split()
    most = re.sub(r'\[-.*?\]', '', pattern).split()
    try:
        found, given = gnu_getopt(words, short, longer)
    except GetoptError as error:
        raise Usage(printable(str(error)))
    if len(given) < len(least) or (len(given) > len(most) and '...' not in pattern):
        raise Usage('wanted: ' + (pattern or 'no words'))
    takes = dict(known)
    return given, dict((name, value if takes[name] else True) for name, value in [
        (option.lstrip('-'), value) for option, value in found])

def run_command(host, words):
    if not words or words[0] in ('help', '-h', '--help'):
        return tell('dockhand: git push deploys anything that fits in a container\n%s',
                    ''.join('\n  dockhand %-28s %s' % (name + ' ' + words, act.__doc__)
                            for name, act, words in COMMANDS))
    for name, function, pattern in COMMANDS:
        if name == words[0]:
            given, options = parse_arguments(pattern, words[1:])
            refuse_if(os.geteuid() != 0, 'root only: sudo dockhand ' + name)
            return function(host, *given, **options)
    raise Usage('no command "%s"; `dockhand` alone lists them', printable(words[0]))

def installed_user(host):
    """The git user of the installation at hand, for a script that is run directly."""
    found = re.findall(r"'dockhand', '([a-z0-9._-]+)'\)", host.text(PROGRAM))
    return (found + ['git'])[0]

def main(role, user):
    """Run as one of dockhand's names; the exit status."""
    on_signals(leave)
    os.umask(0o022)
    host, words, status = Host(user=user), sys.argv[1:], 0
    try:
        if role == 'receive':
            receive(host, *words or [''])
        elif words[:1] == ['serve'] and len(words) > 1:
            serve(host, *words[1:])
        else:
            run_command(host, words)
    except (Failure, Stopped, EnvironmentError) as problem:
        say('dockhand: %s', problem)
        if role == 'receive' or words[:1] == ['serve']:
            log('%s: refused: %s', ' '.join(words), problem)
        status = 2 if isinstance(problem, Usage) else 1
    if role == 'receive' and say.patience <= 0:
        hang_up(host)
    return status

if __name__ == '__main__':
    sys.exit(main('dockhand', installed_user(Host())))
