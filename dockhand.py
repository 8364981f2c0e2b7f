#!/usr/bin/env python3
"""dockhand: git push deploys anything that fits in a container, on your own server.

    python3 dockhand.py install          make this machine ready (safe to repeat)
    dockhand upload-key NAME < id.pub    who may push; also `gitreceive upload-key NAME`
    git push git@HOST:APP.git main       deploy: build, check, switch, or change nothing

It calls git, docker, nginx and init, and writes their own plain files: no daemon, no
database. Take it away and every app goes on running and comes back at boot. `dockhand`
alone lists what people run; sshd runs `dockhand serve KEY`, the repositories' hooks
`sudo receive update ...` and `sudo receive post-receive ...`.

Whoever may push may become root: a pushed upstart.conf may mount the whole disk or ask
for --privileged, and where PID 1 is Upstart init runs it as root. Rights to single apps,
and the rules for proxy files, are against accidents; they are no jail.

It makes the user git, and writes to /usr/local/lib/dockhand, /usr/local/bin, /home/git,
/var/lib/dockhand, /etc/sudoers.d/dockhand, /run/lock/dockhand; a unit, job or script that
runs `recover` at boot; 000-dockhand.conf and one APP.conf each in nginx's conf.d, folders
in /var/cache/nginx; a job each in /etc/init where that is Upstart; where an app brings a
crontab, /etc/cron.d/dockhand-APP, and locks in /run/dockhand; where it has https a hook
of certbot's, who writes below /etc/letsencrypt; ".*.new" files beside what it replaces,
and one in docker's folder, to see that it can be written. nginx's own default site, if
nobody changed it, becomes *.disabled. To docker it gives images, containers, volumes and
one network; where other machines were added, a swarm. Where nginx does not run, what
wants it to reload starts it; `recover` restarts docker where docker keeps a port for no
container.

How to read it. Each section has a banner and uses those above it (Host alone names four
classes further down). First come the tools, then pure functions: what strangers send is
read, judged and rendered there, and nothing is touched. Then docker, nginx, the app and
the three engines, each a class. From "Switching" on they act. A push is `serve`, as the
git user; then, as root, `receive` and `deploy`, which check, build and `apply`. Who
decides whether to run this as root reads "What is pushed", "Receiving" and "Deploying",
and then "Switching".

Copyright the dockhand authors. MIT licence: do as you like, keep this line, no warranty.
"""
import fcntl
import os
import re
import select
import signal
import stat
import sys
import time
from collections import OrderedDict, deque, namedtuple
from contextlib import contextmanager
from errno import ESRCH
from functools import partial

# ---- Python 2.7 and 3 ------------------------------------------------------------------
# All that differs between them, for every section below.

PYTHON_2 = sys.version_info[0] == 2
monotonic = time.time if PYTHON_2 else time.monotonic
# The other control characters, of ISO 6429, in native text
C1 = '\xc2[\x80-\x9f]' if PYTHON_2 else '[\x80-\x9f]'

def to_text(data):
    """Bytes from a disk or a pipe as the native str."""
    return data if PYTHON_2 else data.decode('utf-8', 'surrogateescape')

def to_bytes(text):
    """The native str (or 2.7's unicode) as bytes for a disk or a pipe."""
    errors = 'strict' if PYTHON_2 else 'surrogateescape'
    return text if isinstance(text, bytes) else text.encode('utf-8', errors)

def quote(word):
    """A word as a shell reads it back."""
    if PYTHON_2:
        from pipes import quote as quoted
    else:
        from shlex import quote as quoted
    return quoted(word)

# Before, it names no host to a server that speaks TLS
SPEAKS_TLS = sys.version_info >= (2, 7, 9)

def tls_context():
    """What opens a connection with TLS, for looking alone: nothing is verified."""
    import ssl
    protocol = ssl.PROTOCOL_SSLv23 if PYTHON_2 else ssl.PROTOCOL_TLS_CLIENT
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context

# ---- Constants: paths, limits, templates -----------------------------------------------
# What is written where, how long is waited, and the texts of our own files.

LIBRARY = '/usr/local/lib/dockhand'
STATE = '/var/lib/dockhand'
PROGRAM = '/usr/local/bin/dockhand'
OLDER_NAME = '/usr/local/bin/gitreceive'
RECEIVE = LIBRARY + '/receive'
TEMPLATE = LIBRARY + '/template'
USER_FILE = LIBRARY + '/user'       # the name of the git user
KEPT_USER = STATE + '/user'         # the same, while dockhand is uninstalled
TOKEN_FILE = LIBRARY + '/token'     # it tells this server's answers from those of others
TOKEN_PATH = '/.well-known/dockhand'
INSTALL_AGAIN = 'sudo %s %s/dockhand.py install' % (sys.executable, LIBRARY)
LOCKS = '/run/lock/dockhand'
SUDOERS = '/etc/sudoers.d/dockhand'
NGINX = '/etc/nginx'
# What logrotate adds to the name of a log
ROTATED = r'([.-][0-9]+)?(\.(gz|xz|bz2|zst))?\Z'
PROXIES = '/etc/nginx/conf.d'
NGINX_LOGS = '/var/log/nginx'
CATCH_ALL = PROXIES + '/000-dockhand.conf'
STREAMS = STATE + '/streams'           # what goes to other servers, or comes, just now
CERTIFICATES = STATE + '/certificates'      # what nginx reads; certbot has its own
OWN_CERTIFICATES = CERTIFICATES + '/own'    # that people brought
CHALLENGES = STATE + '/acme'                # where a certificate authority looks
CHALLENGE_PATH = '/.well-known/acme-challenge/'
CERTBOT = '/etc/letsencrypt'
RENEWAL_HOOK = CERTBOT + '/renewal-hooks/deploy/dockhand'
CRON_FILES = '/etc/cron.d'
CRON_LOCKS = '/run/dockhand'                # root's own: in /run/lock anybody may write
JOBS = '/etc/init'
JOB_LOGS = '/var/log/upstart'
UNITS = ('/etc/systemd/system', '/lib/systemd/system', '/usr/lib/systemd/system')
BOOT_JOB = JOBS + '/dockhand-recover.conf'
UNIT = UNITS[0] + '/dockhand-recover.service'
UNIT_ENABLED = [UNITS[0] + '/%s.wants/dockhand-recover.service' % name
                for name in ('multi-user.target', 'docker.service')]
BOOT_SCRIPT = '/etc/init.d/dockhand-recover'

PATIENCE = 5.0                      # seconds that we wait for a pusher, in all
LOG_LINES = 20                      # that he gets of an app that does not answer
LINE_LIMIT = 2 ** 13                # bytes of a line that he gets of any command
CHECKOUT_TIMEOUT = 300              # seconds for git to write the files of a commit
HEALTH_TIMEOUT = 60                 # seconds for an app to answer in
STEADY = 2.0                        # seconds that it must keep running
RELOAD_TIMEOUT = 10                 # seconds for nginx to follow
SIGNAL_TIMEOUT = 2                  # seconds until it is asked why it does not
DRAIN = 30                          # seconds for requests that were begun
CERTBOT_TIMEOUT = 300               # seconds for the certificates of an app
ORDER_AGAIN = 720                   # seconds until a push asks again for one
WARN_DAYS = 14                      # before a certificate that people brought ends
FILE_LIMIT = 2 ** 18                # bytes of a pushed file
CRON_LINES = 100                    # of a crontab, comments left out
COMMAND_LETTERS = 8000              # of a line of a Procfile
CRON_LETTERS = 900                  # of one of them; cron itself reads 999
MOST_PATHS = 100000                 # files and folders of a commit
LONGEST_PATH = 2000                 # letters of one of them, as git shows it
BYTE_ORDER_MARK = b'\xef\xbb\xbf'      # of an editor of Windows
BLOCK = 4096                        # bytes of disk that the smallest file takes
SPACE = 512                         # MB that are free before a build
WRITTEN = 2 ** 16                   # bytes for a trial of docker's disk, before a stop
KEPT = 5                            # images of which releases stay; the live one's is one
KEPT_ALIKE = 2                      # releases of one image that do
LISTED = 50                         # newer ones, then a failed release's record goes
DEFAULT_BRANCHES = ('main', 'master')
WEB_PORTS = ('80', '8080', '8000', '5000', '3000')      # an EXPOSE of these is for nginx
HTTP_PORTS = WEB_PORTS + ('443',)
OVERLAY = 'dockhand--machines'      # the network of apps over several machines
MACHINES = STATE + '/machines'      # there while other machines belong to this one
MACHINE_PORTS = (20000, 29999)      # the first and the last on which a machine answers
NETWORK = 'dockhand'                # of plain apps; its /16 is one of these
SUBNETS = ['10.%d' % number for number in range(86, 128)] + [
    '172.%d' % number for number in range(31, 19, -1)]

# For every command. What is checked of a commit must be what is built: git is to know of
# no replaced objects.
ENVIRONMENT = {
    'PATH': '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
    'HOME': '/root', 'LC_ALL': 'C', 'GIT_NO_REPLACE_OBJECTS': '1',
    'BUILDKIT_PROGRESS': 'plain', 'BUILDX_NO_DEFAULT_ATTESTATIONS': '1'}

# Where docker looks for the init that it gives to a container
INIT_FOLDERS = ENVIRONMENT['PATH'].split(':') + '''/usr/libexec /usr/libexec/docker
    /usr/lib/docker /usr/local/libexec /usr/local/libexec/docker
    /usr/local/lib/docker'''.split()

# Where it looks for buildx
PLUGIN_FOLDERS = [folder + '/docker/cli-plugins' for folder in '''/usr/libexec /usr/lib
    /usr/local/libexec /usr/local/lib'''.split()] + ['/root/.docker/cli-plugins']

# What Dockerfiles often start from (an app of that name would be the image that they get;
# names of images that are here already are refused besides), or the server uses
TAKEN_NAMES = set('''almalinux alpine amazonlinux archlinux bash buildpack-deps busybox
    caddy centos clojure composer consul couchdb debian docker dotnet elasticsearch elixir
    erlang fedora gcc ghost golang gradle haproxy haskell httpd influxdb java jetty jruby
    julia kong mariadb maven memcached mongo mono mysql nats nginx node openjdk
    oraclelinux perl php postgres pypy python r-base rabbitmq redis registry rockylinux
    ruby rust scratch solr swift tomcat traefik ubuntu varnish wordpress cron default git
    gitreceive init localhost network networking plan receive root ssh sshd'''.split())

LAUNCHER = '''#!{python} {flags}
import gc, os, sys
gc.disable()
sys.path.insert(0, '{library}')
import dockhand
os._exit(dockhand.main({role!r}))
'''
# /usr/local/bin/dockhand. The start of a Python is a fourth of what a small push takes:
# where it has nothing to decide it is left out.
PROGRAM_TEXT = '''#!/bin/sh
# dockhand. Where a key without limits pushes to a repository that is there, or fetches
# from it, git has it at once, as `serve` would hand it over; all else is Python's.
case "$1 $# ${{SSH_ORIGINAL_COMMAND:-}}" in
"serve 2 git-receive-pack '"*".git'" | "serve 2 git-upload-pack '"*".git'")
    LC_ALL=C
    home={home}
    verb=${{SSH_ORIGINAL_COMMAND%% *}}
    app=${{SSH_ORIGINAL_COMMAND#*\\'}}
    app=${{app#/}}
    app=${{app%.git\\'}}
    case $app/$2 in
    [!a-z]* | *[!a-z0-9.-]*/* | */*[!a-z0-9.-]*) ;;
    *)  # What has a folder there has the name of an app. That the key came is noted too,
        # for `dockhand keys`
        umask 022
        if [ -d "{state}/apps/$app" ] && [ -d "$home/$app.git" ] &&
            {{ true >"$home/{uses}/$2"; }} 2>/dev/null; then
            exec env -i {environment} \\
                HOME="$home" DOCKHAND_APP="$app" DOCKHAND_KEY="$2" \\
                GIT_PROTOCOL="${{GIT_PROTOCOL:-}}" \\
                SSH_CONNECTION="${{SSH_CONNECTION:-}}" \\
                {git} "${{verb#git-}}" "$home/$app.git"
        fi ;;
    esac ;;
esac
exec {python} "$@"
'''
HOOK = '#!/bin/sh\nexec sudo -n %s %s "$DOCKHAND_APP" "$DOCKHAND_KEY" %s\n'
HOOKS = [('update', HOOK % (RECEIVE, 'update', '"$@"')),
         ('post-receive', HOOK % (RECEIVE, 'post-receive', '"$SSH_CONNECTION"'))]
# What sudo lets through to root of whoever came by ssh
ASKED = ('SSH_ORIGINAL_COMMAND', 'SSH_CONNECTION')
SUDOERS_TEXT = '''Defaults:{user} env_keep += "{asked}"
{user} ALL=(root) NOPASSWD: {receive}
'''
# Of each new repository. Refusals are those of our hook, which says what to type (a
# deletion is one of them); one pack for each push, and small ones joined now and then;
# nobody fetches or pushes refs/dockhand, which keeps the commits of releases.
REPOSITORY_CONFIG = '''[core] bare = true
[core] hooksPath = hooks
[receive] shallowUpdate = true
[receive] unpackLimit = 1
[receive] denyDeleteCurrent = ignore
[transfer] hideRefs = refs/dockhand
[gc] autoPackLimit = 20
[gc] bigPackThreshold = 32m
[gc] autoDetach = false
'''
UNIT_TEXT = '''[Unit]
Description=dockhand: put right what a crash left of a deploy
After=docker.service
Before=nginx.service
[Service]
Type=oneshot
ExecStart={program} recover
[Install]
WantedBy=multi-user.target docker.service
'''
BOOT_SCRIPT_TEXT = '''#!/bin/sh
### BEGIN INIT INFO
# Provides:          dockhand-recover
# Required-Start:    $local_fs $remote_fs $network
# Required-Stop:
# Should-Start:      docker
# X-Start-Before:    nginx
# Default-Start:     2 3 4 5
# Default-Stop:
# Short-Description: dockhand: put right what a crash left of a deploy
### END INIT INFO
case "${{1:-}}" in
start) exec {program} recover ;;
stop | restart | force-reload | status) ;;
*) echo "usage: $0 start" >&2; exit 2 ;;
esac
'''
BOOT_JOB_TEXT = '''description "dockhand: put right what a crash left of a deploy"
start on started docker
task
exec {program} recover
'''
# Which certbot runs for each certificate that it has renewed: with it, or after dockhand
# has gone. It acts on those that dockhand ordered.
RENEWAL_HOOK_TEXT = '''#!/bin/sh
# dockhand: gives nginx its own copy of a certificate that certbot has renewed
set -eu
PATH=/usr/sbin:/usr/bin:/sbin:/bin
umask 077
name=$(basename "$RENEWED_LINEAGE")
case $name in dockhand-*) name=${{name#dockhand-}} ;; *) exit 0 ;; esac
cd {certificates} || exit 0
new=.$name.pem.renewed
trap 'rm -f "$new"' EXIT
cat "$RENEWED_LINEAGE/fullchain.pem" "$RENEWED_LINEAGE/privkey.pem" >"$new"
[ "$(openssl x509 -noout -pubkey -in "$new")" = "$(openssl pkey -pubout -in "$new")" ]
sync
mv "$new" "$name.pem"
[ ! -s /run/nginx.pid ] || {{ nginx -t -q && nginx -s reload; }}
'''.format(certificates=CERTIFICATES)
KEYS = '.ssh/authorized_keys'
USES = '.ssh/dockhand'          # a file for each key's name: when it came last
KEYS_END = '# dockhand: end of keys'
KEYS_BEGIN = '# dockhand: keys from here to the next mark; see `dockhand keys`'
KEY_OPTIONS = 'no-port-forwarding,no-X11-forwarding,no-agent-forwarding,no-user-rc'
OLDER_KEY_OPTIONS = KEY_OPTIONS.replace(',no-user-rc', ',no-pty,no-user-rc')
PUBLIC_KEY = r'([a-z0-9.@-]{1,99})\s+(AAAA[A-Za-z0-9+/]+={0,2})(?:\s|\Z)'
# A line of authorized_keys with options, as sshd reads it: they end at the first blank
# that is in no quotes; the names of options have no case
KEY_LINE = r'''(?x) [ \t]*
    (?P<options>(?:\\"|\\(?!")|"(?:\\"|\\(?!")|[^"\\])*"|[^ \t"\\])+)
    [ \t]+ (?P<type>\S+) [ \t]+ (?P<blob>\S+)'''
# Of a forced command: the key's name and the words of its rights, whatever they are and
# whatever stands around
SERVED = r'''(?x) (?:^|[\s;&|('"/\\]) (?:dockhand(?:\.py)?|gitreceive) ['"\\]*
    \s+ serve \s+ ['"\\]* (?P<name>[A-Za-z0-9._@-]+) ['"\\]*
    (?P<words>(?:\s+(?!\#|[0-9]*[<>])(?:[^\s'"\\;&|()<>]+|'[^'"\\]*'|\\"[^'"\\]*\\"))*)'''
KEY_OPTION = r'(?:\\"|\\(?!")|"(?:\\"|\\(?!")|[^"\\])*"|[^",\\])+'

# ---- The little OS layer ---------------------------------------------------------------
# What to say, commands, files, locks, undoing: tools for all that follows, and Host, the
# seam at which the tests put another machine.

class Failure(Exception):
    """One line for a person: what is wrong, what to do. A text alone may hold a `%`."""
    def __init__(self, text, *values):
        Exception.__init__(self, text % values if values else text)

def refuse_if(wrong, text, *values):
    if wrong:
        raise Failure(text, *values)

class Stopped(Exception):
    """A signal would have ended the process: raised, so that what was begun is undone."""

class Usage(Failure):
    """A command line that is none. The exit status is 2."""

class Voice(object):
    """Writes lines to a pusher who may be gone, stopped or slow: git leaves its pipe open
    and unread then. After `patience` seconds of waiting in all it is silent.
    reword: a function of the text"""
    def __init__(self, fd, patience=PATIENCE):
        self.fd = fd
        self.patience = patience
        self.reword = str

    def __call__(self, text, *values):
        self.write(self.reword(text % values if values else text) + '\n')

    def write(self, text):
        """The same for what is somebody's own, as a value or a file: as it is."""
        data = to_bytes(text)
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)

        while data and self.patience > 0:
            begun = monotonic()
            ready = poll.poll(self.patience * 1000)
            self.patience -= monotonic() - begun
            if not ready:
                continue
            try:
                written = os.write(self.fd, data[:4096])
                data = data[written:]
            except EnvironmentError:
                self.patience = 0

say = Voice(2)
tell = Voice(1, patience=3600)      # for the commands that people run, and may page

def step(text, *values):
    say('-----> ' + text, *values)

def detail(text, *values):
    for line in (text % values if values else text).splitlines():
        say('       ' + line)

def say_busy(seconds):
    """A sign of life of a command that is silent."""
    detail('... still busy after %d s', seconds)

def log(text, *values):
    """A line in the system's log: who changed what, or was refused."""
    import syslog
    syslog.openlog('dockhand')
    syslog.syslog(printable(text % values, 500))

def printable(text, limit=80):
    """What a stranger sent, fit for a message: printable ASCII, not too long."""
    text = re.sub(r'[^ -~]', '?', text)
    return text if len(text) <= limit else text[:limit] + '...'

# What moves a terminal's cursor or colours, or names its window
CONTROL_SEQUENCE = r'\x1b\[[\d;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)'

def plain_line(text):
    """A line of a command's output without control characters and colours."""
    text = re.sub(CONTROL_SEQUENCE, '', text)
    return re.sub('[\0-\x08\x0b-\x1f\x7f]|' + C1, '', text).rstrip()

Result = namedtuple('Result', 'status out err')
Account = namedtuple('Account', 'name uid gid home shell')

def execute(argv, each=None, idle=None, beside=None, **options):
    """Run a command, never through a shell; a Result(status, out, err).
    each: gets each line of both its streams as it comes; idle: as read_lines has it;
    beside: a function that is called once it runs; options: as start_command has them"""
    is_joined = each is not None
    with Begun(start_command(argv, is_joined=is_joined, **options)) as running:
        if beside:
            beside()
        if each:
            read_lines(running.process.stdout.fileno(), each, idle)
        return running.result()

OUT_OF_TIME = 124               # the status of a command that `timeout` has ended

LONGEST_BESIDE = 60             # seconds

def begin_command(argv):
    """The same, Begun: it runs beside what follows, so long at most, even where we are
    killed. For what asks or tests, and for one change of what nothing else changes."""
    return Begun(start_command(['timeout', '%d' % LONGEST_BESIDE] + list(argv)))

def start_command(argv, env=None, cwd='/', account=None, stdin=None, stdout=None,
                  is_joined=False):
    """A process that runs a command, as an Account; Failure where there is none.
    env: added to ENVIRONMENT; stdin: a file that it reads on from, instead of nothing;
    stdout: a file that gets what it prints, instead of a pipe
    is_joined: whether that goes for what it prints to its standard error too"""
    from subprocess import PIPE, STDOUT, Popen
    variables = dict(ENVIRONMENT, **(env or {}))
    if account:
        variables.update(HOME=account.home, USER=account.name, LOGNAME=account.name)

    stderr = STDOUT if is_joined else PIPE
    with open(os.devnull) as null:
        try:
            return Popen(argv, stdin=stdin or null, stdout=stdout or PIPE, stderr=stderr,
                         env=variables, cwd=cwd, close_fds=True,
                         **rights_of_process(account))
        except OSError as error:
            raise Failure('%s: %s', argv[0], error.strerror)

def rights_of_process(account):
    """The options with which Popen runs a command as an Account. Where no function of
    ours is called in the process, it starts in a quarter to half of the time; then
    Python 3 itself does not hand on that it ignores SIGPIPE."""
    is_other = account is not None and os.geteuid() == 0
    if PYTHON_2 or is_other and sys.version_info < (3, 9):
        return {'preexec_fn': partial(become, account)}
    if not is_other:
        return {}
    groups = os.getgrouplist(account.name, account.gid)
    return {'user': account.uid, 'group': account.gid, 'extra_groups': groups}

class Begun(object):
    """A command that runs, inside a `with`: it does not go on alone when that is left."""
    def __init__(self, process):
        self.process = process
        self.said = None

    def is_over(self):
        return self.process.poll() is not None

    def result(self):
        """Its Result, once it is over."""
        if self.said is None:
            self.said = Result(1, '', 'it was interrupted')     # by what is raised here
            out, err = self.process.communicate()
            self.said = Result(self.process.returncode, to_text(out or b''),
                               to_text(err or b''))
        return self.said

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        if not self.is_over():
            end_group(self.process)
            self.process.kill()
        for pipe in filter(None, (self.process.stdout, self.process.stderr)):
            pipe.close()
        self.process.wait()

def end_group(process):
    """Kill those whom a process leads, as `timeout` does what it runs."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:                         # it leads none
        pass

def become(account):
    """In the process of a command: what Python ignores, and who runs it."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if account and os.geteuid() == 0:
        os.setgid(account.gid)
        os.initgroups(account.name, account.gid)
        os.setuid(account.uid)

def with_rights_of(account, function, *args):
    """Call a function in a process that has an Account's rights alone. Gives what that
    gives, a plain value, since it comes through marshal; what it raises as a Failure."""
    import marshal
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        answer_as(account, writing, function, *args)

    os.close(writing)
    try:
        with os.fdopen(reading, 'rb') as answer:
            data = answer.read()
    except BaseException:                   # a signal: it must not go on alone
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.waitpid(child, 0)

    try:
        result, problem = marshal.loads(data)
    except (EOFError, ValueError, TypeError):
        problem = 'it came to no end'
    refuse_if(problem, 'as the user %s: %s', account.name, problem)
    return result

def answer_as(account, writing, function, *args):
    """Take an Account's rights, call a function, write what it gives into a pipe, and
    end this process."""
    import marshal
    try:
        if signal.getsignal(signal.SIGTERM) is leave:
            on_signals(signal.SIG_DFL)
        become(account)
        with os.fdopen(writing, 'wb') as answer:
            answer.write(marshal.dumps(answer_of(function, *args)))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)

def answer_of(function, *args):
    """(what a function gives, None), or (None, what it says is wrong)."""
    try:
        return function(*args), None
    except (Failure, EnvironmentError) as error:
        return None, str(error)

def read_lines(fd, each, idle=None, silence=20):
    """Give each line that comes from a pipe to `each`; call `idle`, with the seconds that
    it has taken so far, where none comes for a time."""
    begun = monotonic()
    reader = LineReader()
    data = None
    while data != b'':
        if not select.select([fd], [], [], silence)[0]:
            if idle:
                idle(monotonic() - begun)
            continue

        data = os.read(fd, 65536)
        for line in reader.feed(data):
            each(line)

class LineReader(object):
    """Parts what comes piece by piece into lines, in one pass whatever it is.

    A CR ends a line too: that is how progress is shown. Several of them, and the LF that
    may follow, are one end. Of a line longer than LINE_LIMIT the rest is left out.
    """
    def __init__(self):
        self.rest = b''         # of a line that may go on, and the CR that may be its end
        self.left_out = 0       # bytes of it that are dropped already

    def feed(self, data):
        """The lines that end in what came, as [text]. data: b'' where no more comes"""
        heard = (self.rest + data).split(b'\n')
        last = heard.pop()
        lines = []
        for whole in heard:
            parts = [part for part in whole.split(b'\r') if part]
            lines += [self.take(part) for part in parts or [b'']]

        parts = [part for part in last.split(b'\r') if part]
        self.rest = b''
        if data and parts:
            self.rest = parts.pop()
        lines += [self.take(part) for part in parts]

        self.left_out += max(0, len(self.rest) - LINE_LIMIT)
        self.rest = self.rest[:LINE_LIMIT]
        if data and last.endswith(b'\r'):
            self.rest += b'\r'
        return lines

    def take(self, line):
        """The text of a line that has come to its end; it says what is left out."""
        left_out = self.left_out + max(0, len(line) - LINE_LIMIT)
        self.left_out = 0
        text = plain_line(to_text(line[:LINE_LIMIT]))
        if left_out:
            text += ' ... (%d bytes of this line are left out)' % left_out
        return text

class Clock(object):
    """What time it is, in seconds: since 1970, and since some moment, never backwards
    (but with Python 2.7, where it is the same)."""
    monotonic = staticmethod(monotonic)
    sleep = staticmethod(time.sleep)
    time = staticmethod(time.time)

def open_connection(place, timeout, tls_name=None):
    """A socket that is connected to an (address, port); EnvironmentError if none is.
    tls_name: speak TLS, and ask for this host name; who answers is not verified"""
    import socket
    address, port = place
    # As text, it would have Python load what encodes names of other alphabets
    connection = socket.create_connection((to_bytes(address), port), timeout)
    if tls_name is None:
        return connection

    try:
        return tls_context().wrap_socket(connection, server_hostname=tls_name)
    except BaseException:
        connection.close()
        raise

NEVER = '(?!)'                      # a pattern that matches nothing

class Host(object):
    """Where the machine's files are, how a command is run there: the seam for tests.
    `ask` runs a command that may fail, with execute's options, and gives its Result;
    `begin` begins one that runs beside what follows, and gives it Begun; `signal` sends
    nginx's master, by its process id, a signal."""
    def __init__(self, root='/', run=execute, user='git', clock=Clock,
                 connect=open_connection):
        self.root = root
        self.ask = run
        self.begin = getattr(run, 'begin', begin_command)
        self.signal = getattr(run, 'signal', send_signal)
        self.user = user
        self.clock = clock
        self.connect = connect
        # Chapters of their own, further down: how this host's docker and nginx are asked
        self.docker = Docker(self)
        self.nginx = Nginx(self)
        self.certificates = Certificates(self)
        self.machines = Machines(self)
        self.upstart = None             # what is_upstart found out
        self.asker = None               # the Asker of a command that came by ssh

    def reach(self):
        """The Reach of whoever asks, None for every app."""
        return None if self.asker is None else self.asker.rights.apps

    def person(self):
        """Who runs a command: the name of a key; at the server the user of sudo or doas,
        or else root."""
        if self.asker is not None:
            return self.asker.name
        for variable in ('SUDO_USER', 'DOAS_USER'):
            if os.environ.get(variable):
                return printable(os.environ[variable])
        return 'root'

    def path(self, *parts):
        return os.path.join(self.root, *[part.lstrip('/') for part in parts])

    def text(self, *parts):
        """The text of a file, '' where there is none."""
        return read_file(self.path(*parts)) or ''

    def run(self, argv, **options):
        """Run a command that must succeed; its standard output."""
        return self.tried(argv, NEVER, options).out

    def run_unless(self, pattern, argv, **options):
        """Run a command; False where it fails with words that match, as is expected."""
        return not self.tried(argv, pattern, options).status

    def tried(self, argv, expected, options):
        """The Result, or the Failure `docker start blog--3 failed (1): its last line`."""
        result = self.ask(argv, **options)
        self.check_result(result, argv, expected)
        return result

    def check_result(self, result, argv, expected):
        """Failure for the Result of a command that failed in another way."""
        refuse_if(result.status == OUT_OF_TIME, '%s came to no end in time',
                  ' '.join(argv[:4]))
        if result.status and not re.search('(?i)' + expected, result.err + result.out):
            raise Failure('%s failed (%d): %s', ' '.join(argv[:4]), result.status,
                          last_line(result.err or result.out) or 'it says nothing')

    def account(self):
        """The user who owns the repositories and the keys; None before `install`."""
        for line in self.text('/etc/passwd').split('\n'):
            fields = line.split(':')
            if len(fields) == 7 and fields[0] == self.user:
                name, _, uid, gid, _, home, shell = fields
                return Account(name, int(uid), int(gid), home, shell or '/bin/sh')
        return None

    def git_account(self):
        """The same, or Failure: a command without an account would be root's."""
        account = self.account()
        refuse_if(account is None, 'there is no user %s: %s', self.user, INSTALL_AGAIN)
        return account

    def home(self):
        account = self.account()
        return account.home if account else '/home/' + self.user

    def as_git(self, function, *args):
        """Call a function with the git user's rights alone, where there is that user;
        what it gives. Whatever lies below that home may be a link to anywhere."""
        account = self.account()
        if account is None or os.geteuid() == account.uid:
            return function(*args)
        return with_rights_of(account, function, *args)

# How a command begins to tell what it could do instead, once it has said what is wrong
USAGE = r"(Usage:|usage:|(See|Run) '.* --help')"

def last_line(text):
    """The last line that a command said of what is wrong: docker repeats itself for each
    name, what its runtime says may end in a line of its own, and how to use a command
    follows the reason."""
    last = ''
    for line in text.split('\n'):
        line = plain_line(line)
        if last and re.match(USAGE, line):
            break

        is_repeated = line.startswith('Error: failed to start containers')
        if line and line != ': unknown' and not is_repeated:
            last = line
    return last

def read_file(path):
    """The text of a file; None where there is none, or of a process that has gone."""
    try:
        with open(path, 'rb') as source:
            return to_text(source.read())
    except EnvironmentError:
        if os.path.exists(path):
            raise
        return None

def read_json(path):
    """The dict in a file of ours, {} where there is none."""
    import json
    return native(json.loads(read_file(path) or '{}'))

def to_json(value):
    import json
    return json.dumps(value, indent=1, sort_keys=True) + '\n'

def native(value):
    """What json read, in native str: Python 2.7's gives unicode."""
    if not PYTHON_2:
        return value
    if isinstance(value, dict):
        return dict((native(key), native(each)) for key, each in value.items())
    if isinstance(value, list):
        return [native(each) for each in value]
    return to_text(to_bytes(value)) if isinstance(value, type(u'')) else value

def children(host, parent):
    """{process id: command line, a NUL after each word} of what a process started.
    parent: its id; None or '' of one that does not run"""
    if not parent:
        return {}

    # One that ends while the list is read may hide another from it (proc(5))
    pids = listed_children(host, parent)
    again = listed_children(host, parent)
    while again != pids:
        pids = again
        again = listed_children(host, parent)

    if pids is None:                        # an older kernel has no list
        pids = []
        for pid in os.listdir(host.path('/proc')):
            if pid.isdigit() and process_fields(host, pid)[1:2] == [parent]:
                pids.append(pid)
    return dict((pid, host.text('/proc', pid, 'cmdline')) for pid in pids)

def listed_children(host, parent):
    """[process id] that Linux lists as a process's children, which is quick where there
    are many processes; None where it makes no such list, or the process has gone."""
    folder = host.path('/proc', parent, 'task')
    texts = [read_file(os.path.join(folder, thread, 'children'))
             for thread in list_folder(folder)]
    if not texts or None in texts:
        return None
    return ' '.join(texts).split()

def send_signal(pid, number):
    """Send a process a signal, if it is still there."""
    try:
        os.kill(int(pid), number)
    except OSError as error:
        if error.errno != ESRCH:
            raise

def process_fields(host, pid):
    """What /proc/PID/stat says behind the command's name: state, parent, ...; [] where
    the process has gone. (The name may hold anything, `)` too.)"""
    return host.text('/proc', str(pid), 'stat').rpartition(')')[2].split()

def start_ticks(host, pid):
    """When a process began, in clock ticks since boot; None where it is not known."""
    fields = process_fields(host, pid)
    return int(fields[19]) if len(fields) > 19 else None

def own_mark(host):
    """Which process this is, told from a later one of the same number."""
    return '%d %s' % (os.getpid(), start_ticks(host, os.getpid()))

def is_attended(host, mark):
    """Whether the process of an own_mark is there."""
    pid, _, began = mark.partition(' ')
    return began.isdigit() and str(start_ticks(host, pid)) == began

@contextmanager
def replacing(path):
    """A name beside a path to write to; it takes the path's place if all goes well."""
    temporary = temporary_of(path)
    try:
        remove_file(temporary)              # a crash may have left one
        yield temporary

        os.rename(temporary, path)
        sync_folder(os.path.dirname(path))
    except EnvironmentError as error:
        raise Failure('%s: %s', path, error.strerror)
    finally:
        remove_file(temporary)

def create_file(path):
    """A new file that nobody else reads, to be written."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'wb')

def replace_file(path, text, mode=0o644, check=None):
    """Replace a file whole: a crash leaves the old or the new; True if it changed.
    `check` gets the path of the new file beforehand, to raise if it will not do."""
    if read_file(path) == text and mode_of(path) == mode:
        remove_file(temporary_of(path))
        return False

    with replacing(path) as temporary:
        with create_file(temporary) as target:
            target.write(to_bytes(text))
            target.flush()
            os.fchmod(target.fileno(), mode)
            os.fsync(target.fileno())
        if check:
            check(temporary)
    return True

def mode_of(path):
    """Who may read, write and run a file that is there."""
    return stat.S_IMODE(os.stat(path).st_mode)

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
    found = os.path.lexists(path)
    if found:
        os.unlink(path)
        sync_folder(os.path.dirname(path))
    return found

def sync_folder(path):
    """Make what was renamed or removed in a folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)

def list_folder(path):
    """The names in a folder, in their order; [] where there is none."""
    return sorted(os.listdir(path)) if os.path.isdir(path) else []

def make_folder(path, mode=0o755, account=None):
    """Make a folder, and those above it that are missing; True if it was not as asked."""
    made = not os.path.isdir(path)
    if made:
        os.makedirs(path)

    before = os.stat(path)
    if stat.S_IMODE(before.st_mode) != mode:
        os.chmod(path, mode)
    if account:
        os.chown(path, account.uid, account.gid)
    return made or os.stat(path)[:6] != before[:6]

@contextmanager
def locked(path, purpose, patience=None):
    """Hold a lock on a file that is never deleted; the purpose is written in it.
    patience: seconds to wait for it, then it is a Failure; None: as long as it takes"""
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        os.makedirs(folder)
    refuse_if(os.lstat(folder).st_uid != os.geteuid(), 'somebody else made %s, and could '
              'mislead root there: sudo rm -r %s', folder, folder)

    with open(path, 'a+') as holder:
        fcntl.fcntl(holder, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        try:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except EnvironmentError:
            other = (read_file(path) or '').strip() or 'another command'
            step('Waiting for ' + other)
            if patience is None:
                fcntl.flock(holder, fcntl.LOCK_EX)
            else:
                wait_for_lock(holder, patience, other)

        holder.truncate(0)
        holder.write('%s, since %s\n' % (purpose, time.strftime('%H:%M:%S')))
        holder.flush()
        yield

def wait_for_lock(holder, patience, other):
    """Take a lock that another command has, in so many seconds, or Failure."""
    deadline = monotonic() + patience
    while True:
        try:
            return fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except EnvironmentError:
            refuse_if(monotonic() > deadline, 'it took too long to wait for %s', other)
            time.sleep(0.2)

def held_for(path):
    """What somebody holds a lock for at this moment, in words; '' where nobody does."""
    if not os.path.exists(path):
        return ''
    with open(path) as holder:
        try:
            fcntl.flock(holder, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return ''
        except EnvironmentError:
            return holder.readline().strip() or 'another command'

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
        on_signals(signal.SIG_IGN)      # for good: to be undone is all that is left
        attempt('while undoing', function, *args)
        raise

def leave(number, frame):
    raise Stopped('stopped by signal %d' % number)

def on_signals(action):
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, action)

# ---- What is pushed: names, ssh commands, refs, keys (pure functions) ------------------
# What strangers send is taken as it is or refused, never repaired. No command is run.

APP_NAME = r'[a-z]([._-]?[a-z0-9])+\Z'
OBJECT_ID = re.compile(r'(?:[0-9a-f]{40}|[0-9a-f]{64})\Z')

def check_app_name(name):
    """An app's name as it is, or Failure. It is never repaired."""
    is_spelled_so = re.match(APP_NAME, name) is not None
    if not is_spelled_so or len(name) > 40 or name.endswith('.git'):
        raise Failure('"%s" is no name for an app: 2 to 40 of a-z, 0-9 and single "-", '
                      '"_", ".", a letter first', printable(name))
    if name in TAKEN_NAMES or name.startswith('dockhand'):
        raise Failure('"%s" is a name that Dockerfiles start from or the server itself '
                      'uses: choose another', name)
    return name

def is_app_name(name):
    """Whether an app may be called so."""
    try:
        check_app_name(name)
    except Failure:
        return False
    return True

def check_key_name(name):
    """The name of a key as it is, or Failure."""
    if not re.match(r'[A-Za-z0-9][A-Za-z0-9._@-]{0,63}\Z', name):
        raise Failure('"%s" is no name for a key: 1 to 64 of a-z A-Z 0-9, later "._@-" '
                      'too', printable(name))
    return name

def parse_git_command(text):
    """What git asks for over ssh, as (verb, app): `git-receive-pack 'app.git'` for a
    push, `git-upload-pack` for a fetch; ssh://HOST has a "/" first. None for all that git
    does not say; Failure for what is no app's name."""
    match = re.match(r"git[ -](receive-pack|upload-pack) '([^']*)'\Z", text)
    if match is None:
        return None

    verb, path = match.groups()
    if path.startswith('/'):
        path = path[1:]
    if path.endswith('.git'):
        path = path[:-len('.git')]
    return verb, check_app_name(path)

def split_words(text):
    """The words of a command as a shell would split it; nothing is expanded."""
    import shlex
    try:
        return shlex.split(text)
    except ValueError:
        raise Failure('a quote in this command is not closed')

# Addresses of whoever came by ssh, and of this server, where it came to
Connection = namedtuple('Connection', 'client server')

def parse_connection(text):
    """The Connection of sshd's SSH_CONNECTION, `ADDRESS PORT ADDRESS PORT`; None for
    anything else."""
    fields = text.split(' ')
    if len(fields) != 4:
        return None

    client = fields[0]
    server = fields[2]
    if not is_address(client) or not is_address(server):
        return None
    return Connection(client, server)

def is_address(text):
    """Whether a text is an IPv4 or IPv6 address."""
    try:
        pack_address(text)
    except (EnvironmentError, ValueError):
        return False
    return True

def pack_address(text):
    """The bytes of an IPv4 or IPv6 address; EnvironmentError or ValueError for others."""
    import socket
    family = socket.AF_INET6 if ':' in text else socket.AF_INET
    return socket.inet_pton(family, text)

# {first number: those that may follow}, as in 172.16.0.0/12
PRIVATE_PARTS = {100: range(64, 128), 169: [254], 172: range(16, 32), 192: [168]}

def is_private(address):
    """Whether an address is one that only neighbours reach: of RFC 1918, 6598 or 4193,
    loopback or link-local."""
    if address == '::1':
        return True
    if ':' in address:
        first = int(address.partition(':')[0] or '0', 16)
        return first & 0xfe00 == 0xfc00 or first & 0xffc0 == 0xfe80

    first, second = [int(part) for part in address.split('.')[:2]]
    return first in (10, 127) or second in PRIVATE_PARTS.get(first, [])

def web_address(connection):
    """The address of this server that a Connection's client can ask too; None where none
    is known, as of a server whose public address is a router's."""
    if connection is None:
        return None
    if is_private(connection.server) and not is_private(connection.client):
        return None
    return connection.server

def deployed_branches(branch):
    """The names that a push deploys. branch: None before the first deploy"""
    return (branch,) if branch else DEFAULT_BRANCHES

def judge_ref(ref, new, branch):
    """'deploy', 'plan', 'store', or Failure; branch: None before the first deploy."""
    if ref.startswith('refs/tags/'):
        return 'store'
    if not ref.startswith('refs/heads/'):
        raise Failure('%s is refused: push a branch or a tag', printable(ref))
    if not new.strip('0'):
        raise Failure('branches are not deleted here; to remove the app: '
                      'sudo dockhand destroy APP')

    name = ref[len('refs/heads/'):]
    if name == 'plan':
        return 'plan'
    deployed = deployed_branches(branch)
    if name not in deployed:
        raise Failure('only %s is deployed; to deploy this: git push REMOTE HEAD:%s',
                      ' or '.join(deployed), deployed[0])
    return 'deploy'

# words: what it may do, as they stand in its line
Key = namedtuple('Key', 'type blob name words')

# Words of a key that are no apps
ONLY_READS = '--read-only'
IS_ADMIN = '--admin'

class Reach(tuple):
    """Some apps: each word is a name, or, where it ends with `-`, the beginning of names:
    no name ends so."""
    def __contains__(self, app):
        return any(app == word or word.endswith('-') and app.startswith(word)
                   for word in self)

# What a key may do. apps: a Reach, None for every app
Rights = namedtuple('Rights', 'apps only_reads is_admin')

def read_rights(words):
    """The Rights that the words in a key's line mean."""
    apps = [word for word in words if word not in (ONLY_READS, IS_ADMIN)]
    return Rights(Reach(apps) if apps else None, ONLY_READS in words, IS_ADMIN in words)

def rights_of(keys, name):
    """The Rights of all keys of a name together; None where no key is called so."""
    found = [read_rights(key.words) for key in keys if key.name == name]
    if not found:
        return None
    apps = None
    if all(rights.apps is not None for rights in found):
        apps = Reach(app for rights in found for app in rights.apps)
    return Rights(apps, all(rights.only_reads for rights in found),
                  any(rights.is_admin for rights in found))

def check_rights(words):
    """Failure for words that may not stand in a key's line: no letter of them may be one
    that a shell reads, since sshd has one run the line's command."""
    for word in words:
        if word in (ONLY_READS, IS_ADMIN):
            continue
        check_app_name(word[:-1] if word.endswith('-') else word)
    check_means_something(words)

def check_means_something(words):
    """Failure for words of a key's line, which somebody may have written by hand, that
    are no rights: what limits less than he thinks is to limit all."""
    for word in words:
        app = word[:-1] if word.endswith('-') else word
        if word not in (ONLY_READS, IS_ADMIN) and not re.match(APP_NAME, app):
            raise Failure('"%s" is no right: an app is, the beginning of names as '
                          'shop-, --read-only or --admin', printable(word))
    rights = read_rights(words)
    refuse_if(rights.is_admin and (rights.apps or rights.only_reads), '--admin is for '
              'who manages every app: leave out what it is to be limited to')

def words_text(words):
    """The rights of a key's line in words."""
    try:
        check_means_something(words)
    except Failure as problem:
        return 'may do nothing: %s' % problem
    return rights_text(read_rights(words))

def rights_text(rights):
    """Rights in words."""
    where = 'every app' if rights.apps is None else ' '.join(rights.apps)
    if rights.is_admin:
        return 'may do all'
    return ('may read ' if rights.only_reads else 'may push and manage ') + where

def parse_public_keys(text):
    """[(type, base64 blob)] of lines as in authorized_keys (sshd(8)), without options."""
    if 'PRIVATE KEY' in text:
        raise Failure('this is a private key: keep it, send the .pub file')
    lines = []
    for line in text.replace('\r', '\n').split('\n'):
        line = line.strip()
        if line and not line.startswith('#'):
            lines.append(line)
    if not lines:
        raise Failure('no key came in: cat ~/.ssh/id_ed25519.pub (or id_rsa.pub) | '
                      'ssh HOST "sudo dockhand upload-key NAME"')

    keys = []
    for line in lines:
        match = re.match(PUBLIC_KEY, line)
        if match is None:
            raise Failure('"%s" is no public key: a line of TYPE BASE64 COMMENT is, as '
                          'in id_ed25519.pub', printable(line, 40))
        if re.search(r'\sAAAA[A-Za-z0-9+/]{16}', line[match.end(2):]):
            raise Failure('"%s": two keys on one line: write each on a line of its own',
                          printable(line, 40))
        keys.append(match.groups())
    return keys

# A line of authorized_keys. key: the Key of one by which somebody reaches `dockhand
# serve`, None of all others; forced: the command of such a line
KeyLine = namedtuple('KeyLine', 'text key forced')

def read_authorized_keys(text):
    """[KeyLine] of an authorized_keys file (sshd(8)). What reaches `dockhand serve` is
    ours, wherever it stands and whoever wrote it."""
    lines = text.split('\n')
    if not lines[-1]:
        lines.pop()
    return [read_key_line(line) for line in lines]

def read_key_line(text):
    """The KeyLine of one line."""
    match = re.match(KEY_LINE, text)
    is_comment = text.lstrip(' \t').startswith('#')
    if match is None or is_comment:
        return KeyLine(text, None, None)

    for option in re.findall(KEY_OPTION, match.group('options')):
        name, _, value = option.partition('=')
        forced = value[1:-1]                        # without its quotes
        served = re.search(SERVED, forced)
        if name.lower() == 'command' and served:
            words = [word.strip('\\"\'') for word in served.group('words').split()]
            key = Key(match.group('type'), match.group('blob'), served.group('name'),
                      tuple(words))
            return KeyLine(text, key, forced)
    return KeyLine(text, None, None)

def make_key_line(key):
    """The KeyLine of a Key: who has it reaches `dockhand serve`, no shell."""
    forced = forced_command(key)
    text = 'command="%s",%s %s %s %s' % (forced, key_options(key), key.type, key.blob,
                                         key.name)
    return check_length(KeyLine(text, key, forced))

def key_options(key):
    """What stands beside the command of a key's line: who may `run` may have a
    terminal."""
    return KEY_OPTIONS + ',no-pty' if read_rights(key.words).only_reads else KEY_OPTIONS

def change_rights(line, words):
    """The KeyLine with other rights; what somebody wrote besides, as `from=` or a command
    around ours, stays."""
    begin, end = re.search(SERVED, line.forced).span('words')
    said = ''.join(' ' + word for word in words)
    forced = line.forced[:begin] + said + line.forced[end:]
    text = line.text.replace('"%s"' % line.forced, '"%s"' % forced, 1)
    return check_length(renewed(KeyLine(text, line.key._replace(words=words), forced)))

def renewed(line):
    """The KeyLine with the options of this version, where it had those of an older one,
    or of other rights."""
    if line.key is None:
        return line
    begin = 'command="%s",' % line.forced
    for options in (OLDER_KEY_OPTIONS, KEY_OPTIONS + ',no-pty', KEY_OPTIONS):
        rest = ' %s %s' % (line.key.type, line.key.blob)
        if line.text.startswith(begin + options + rest):
            tail = line.text[len(begin + options):]
            return line._replace(text=begin + key_options(line.key) + tail)
    return line

def forced_command(key):
    return ' '.join((PROGRAM, 'serve', key.name) + key.words)

def check_length(line):
    """The KeyLine as it is, or Failure."""
    if len(line.text) > 8000:
        raise Failure('too many apps for one key: sshd reads lines of up to 8192 bytes')
    return line

def keys_in(lines):
    """The [Key] in some [KeyLine]."""
    return [line.key for line in lines if line.key is not None]

def render_authorized_keys(lines):
    """The text of an authorized_keys file."""
    return ''.join(line.text + '\n' for line in lines)

def add_keys(lines, uploaded, name, words):
    """The [KeyLine] with keys uploaded under a name, whose rights all keys of that name
    get; Failure if one of them has another name. Those of others stay as they are.
    uploaded: as parse_public_keys gives it; words: those of the rights"""
    for key in keys_in(lines):
        if key.name != name and (key.type, key.blob) in uploaded:
            raise Failure('this key is known as "%s": dockhand remove-key %s first, or '
                          'go on using it', key.name, key.name)

    result = []
    for line in lines:
        if line.key is not None and line.key.name == name:
            line = change_rights(line, words)
        result.append(line)

    known = keys_in(result)
    new = []
    for kind, blob in uploaded:
        key = Key(kind, blob, name, words)
        if key not in known:
            known.append(key)
            new.append(make_key_line(key))
    return insert_keys(result, new)

def insert_keys(lines, new):
    """The [KeyLine] with new ones before our end mark; where that is missing, both marks
    are put at the end."""
    if not new:
        return lines
    begin = KeyLine(KEYS_BEGIN, None, None)
    end = KeyLine(KEYS_END, None, None)
    if end not in lines:
        return lines + [begin] + new + [end]
    at = lines.index(end)
    return lines[:at] + new + lines[at:]

def remove_keys(lines, name):
    """The [KeyLine] without the keys of a name."""
    def is_other(line):
        return line.key is None or line.key.name != name
    return list(filter(is_other, lines))

def lines_that_log_in(lines, keys):
    """Which lines, counted from 1, are not ours and hold one of some [Key] still: it logs
    in by them, to whatever they say."""
    blobs = set(key.blob for key in keys)
    numbers = []
    for number, line in enumerate(lines, 1):
        is_comment = line.text.lstrip().startswith('#')
        if line.key is not None or is_comment:
            continue

        if blobs & set(line.text.split()):
            numbers.append(number)
    return numbers

# ---- Config, and the record of a release (pure functions) ------------------------------
# What the server knows of an app, and what it writes down of each release.

def is_port(value):
    """Whether a value is a port, or says that there is none."""
    if value == 'none':
        return True
    is_number = re.match('[1-9][0-9]{0,4}\\Z', value) is not None
    return is_number and int(value) < 2 ** 16

def are_host_names(value):
    """Whether a value is names for nginx's `server_name`, with one blank between."""
    return all(re.match(r'(_|[a-z0-9*.-]+)\Z', name) for name in value.split(' '))

def is_branch_name(value):
    """Whether git takes this for a branch, and no push of it would be another thing."""
    if not re.match(r'\w[\w./-]*\Z', value) or value in ('plan', 'HEAD'):
        return False
    if value.startswith('refs/'):
        return False
    if '..' in value or value.endswith('.'):
        return False
    return all(part and not part.startswith('.') and not part.endswith('.lock')
               for part in value.split('/'))

def is_yes_or_no(value):
    return value in ('yes', 'no')

def is_patience(value):
    return re.match('([3-9]|[1-9][0-9]{1,3})\\Z', value) is not None

def are_words(value):
    """Whether a value is words, as of a command: their quotes are closed."""
    import shlex
    try:
        return bool(shlex.split(value))
    except ValueError:
        return False

def is_folder(value):
    """Whether a value is the path of a folder of a repository: services/api."""
    parts = value.split('/')
    return all(re.match(r'[\w.@+][\w.@+-]*\Z', part) and part not in ('.', '..', '.git')
               for part in parts)

def is_url_path(value):
    return re.match(r'/[!-~]{0,1000}\Z', value) is not None

def is_scale(value):
    """Whether a value says how many there are of some processes: web=2 worker=3."""
    words = value.split()
    kinds = set(word.partition('=')[0] for word in words)
    if not words or len(kinds) < len(words):
        return False
    return all(re.match(PROCESS_TYPE + '=(0|[1-9][0-9]?)\\Z', word) for word in words)

def is_machine_count(value):
    return value == 'all' or re.match('[1-9][0-9]?\\Z', value) is not None

def are_networks(value):
    """Whether a value is addresses and networks, as nginx reads them in a `geo`."""
    words = value.split()
    return bool(words) and all(is_network(word) for word in words)

def is_network(word):
    """Whether a word is an address, or a network by its first one, as 10.0.0.0/8."""
    import binascii
    address, slash, length = word.partition('/')
    if not is_address(address) or not slash:
        return is_address(address)

    data = pack_address(address)
    bits = 8 * len(data)
    if not re.match('(0|[1-9][0-9]{0,2})\\Z', length) or int(length) > bits:
        return False
    behind = (1 << (bits - int(length))) - 1
    return int(binascii.hexlify(data), 16) & behind == 0

Setting = namedtuple('Setting', 'fits wanted')      # whether a value does; what does

PROCESS_TYPE = '[a-z][a-z0-9]*(?:-[a-z0-9]+)*'      # of a Procfile

# What config says of the app itself; every other key is a variable of its environment.
SETTINGS = {
    'domains': Setting(are_host_names, 'host names in lower case are wanted, with one '
                       'blank between two; _ is for all that no app has, none for no '
                       'name at all'),
    'port': Setting(is_port, 'a number from 1 to 65535 is wanted, or none'),
    'branch': Setting(is_branch_name, 'the name of a branch is wanted, as main or live/x,'
                      ' but not plan'),
    'overlap': Setting(is_yes_or_no, 'yes or no is wanted'),
    'timeout': Setting(is_patience, 'a number of seconds from 3 to 9999 is wanted'),
    'release': Setting(are_words, 'a command is wanted, its quotes closed'),
    'trust': Setting(are_networks, 'addresses are wanted, as 192.0.2.7, and networks by '
                     'their first one, as 10.0.0.0/8'),
    'options': Setting(are_words, 'words of `docker create` are wanted, as '
                       '--memory 512m, their quotes closed'),
    'build': Setting(are_words, 'words of `docker build` are wanted, as --target prod, '
                     'their quotes closed'),
    'folder': Setting(is_folder, 'the path of a folder of the repository is wanted, as '
                      'services/api'),
    'check': Setting(is_url_path, 'the path of a page is wanted, as /up'),
    'scale': Setting(is_scale, 'how many of which process is wanted, up to 99, as web=2 '
                     'worker=3'),
    'machines': Setting(is_machine_count, 'on how many machines it is to run is wanted, '
                        'as 2, or all')}

# A variable whose name is like that of a setting, small letters alone, has this before
# its key: as it is typed. All other keys of a config are what they name.
ENV = '--env '

# What variables of older versions are not: all that these knew as settings
OLDER_SETTINGS = ('branch', 'domains', 'overlap', 'port', 'release', 'timeout', 'trust')

# Words of other tools, and of docker, for what is a setting here or no setting at all
HINTS = {
    'options': 'cpus cpuset devices dns gpus hosts memory mounts publish shm sysctl '
               'ulimit user volume volumes',
    'build': 'args arg dockerfile nocache platform secret secrets target',
    'folder': 'context dir directory path root subdir',
    'check': 'health healthcheck healthz probe',
    'scale': 'instances processes replicas web worker workers',
    'domains': 'host hostname vhost',
    'machines': 'machine nodes node servers spread swarm'}
FILES_INSTEAD = {
    'command': 'commit a Procfile', 'cmd': 'commit a Procfile',
    'cron': 'commit a crontab', 'crontab': 'commit a crontab',
    'proxy': 'commit an nginx-proxy.conf', 'nginx': 'commit an nginx-proxy.conf',
    'ssl': 'it is a command: dockhand https', 'tls': 'it is a command: dockhand https',
    'https': 'it is a command: dockhand https'}
EXAMPLES = {'options': 'options="--memory 512m"', 'build': 'build="--target prod"',
            'folder': 'folder=services/api', 'check': 'check=/up',
            'scale': 'scale="web=2"', 'domains': 'domains="www.example.com"',
            'machines': 'machines=2'}

def variable_key(name):
    """The key in a config of the variable with this name."""
    return ENV + name if is_like_setting(name) else name

def is_like_setting(name):
    return re.match('[a-z]+\\Z', name) is not None

def variables_of(config):
    """{name: value} of what a config has for the environment of an app."""
    variables = {}
    for key in config:
        if key.startswith(ENV):
            variables[key[len(ENV):]] = config[key]
        elif key not in SETTINGS:
            variables[key] = config[key]
    return variables

def config_record(config):
    """A config as it is written down, settings told apart from variables."""
    settings = dict((key, config[key]) for key in config if key in SETTINGS)
    return {'settings': settings, 'variables': variables_of(config)}

def read_config(record):
    """The config that was written down; older versions had a single map."""
    settings = record.get('settings')
    variables = record.get('variables')
    if not isinstance(settings, dict) or not isinstance(variables, dict):
        settings = dict((key, record[key]) for key in record if key in OLDER_SETTINGS)
        variables = dict((key, record[key]) for key in record if key not in settings)

    config = dict(settings)
    for name in variables:
        config[variable_key(name)] = variables[name]
    return config

def check_variable(name, value):
    """Failure unless an environment can hold this."""
    if not re.match(r'[A-Za-z_][A-Za-z0-9_.-]*\Z', name):
        raise Failure('"%s" is no name for a variable: letters, digits and "_"',
                      printable(name))

    data = to_bytes(value)
    text = data.decode('utf-8', 'replace')
    refuse_if(re.search(u'[\0\ufffd]', text) or len(data) > 32768, '%s: a variable is '
              'text in UTF-8, up to 32 KB: write it as base64', name)
    refuse_if(has_lines(value) and steers_docker(name), '%s: docker itself would go by '
              'it: a value of several lines wants another name', name)

def has_lines(value):
    """Whether a value is more than one line, which docker's env files cannot hold."""
    return '\n' in value or '\r' in value

def steers_docker(name):
    """Whether docker, or what loads it, goes by a variable of this name itself."""
    prefixes = ('LD_', 'DOCKER_', 'BUILDKIT_', 'BUILDX_', 'COMPOSE_', 'OTEL_',
                'SSL_CERT_')
    names = ('PATH', 'HOME', 'TMPDIR', 'IFS', 'ENV', 'GODEBUG', 'GOGC', 'GOMAXPROCS',
             'GOMEMLIMIT', 'GOTRACEBACK')
    if name.lower() in ('http_proxy', 'https_proxy', 'all_proxy', 'no_proxy'):
        return True
    return name in names or name.startswith(prefixes)

def check_setting(key, value):
    """Failure unless this is a setting that dockhand can follow."""
    if not re.match(r'[a-z]+\Z', key):
        return check_variable(key, value)
    check_is_known(key)
    setting = SETTINGS[key]
    if has_lines(value) or '\0' in value or not setting.fits(value):
        raise Failure('%s=%s: %s', key, printable(value), setting.wanted)

def check_is_known(key):
    """Failure for a name of small letters alone, as settings have them, that is none: as
    a variable it would change nothing, and seem to. With a capital letter, a digit, `_`,
    `-` or `.` (http_proxy, spring.profiles.active) it is a variable."""
    if key in SETTINGS:
        return
    raise Failure('no setting is called "%s": %s variables are in upper case (in lower '
                  'case: --env %s=...)', printable(key), hint_for(key), printable(key))

def hint_for(word):
    """What somebody may have meant by a word that is no setting."""
    import difflib
    if word in FILES_INSTEAD:
        return FILES_INSTEAD[word] + ';'
    known = dict((each, EXAMPLES[setting]) for setting in HINTS
                 for each in HINTS[setting].split())
    known.update((setting, '"%s"' % setting) for setting in SETTINGS)

    # (What is longer than any of them is like none, and would take long to compare.)
    alike = difflib.get_close_matches(word[:30], sorted(known), 1)
    if alike:
        return 'did you mean %s?' % known[alike[0]]
    return 'they are %s;' % ', '.join(sorted(SETTINGS))

def read_env_file(text):
    """[(name, value)] of a file as docker's --env-file reads it; Failure by line."""
    pairs = []
    mark = to_text(BYTE_ORDER_MARK)
    if text.startswith(mark):
        text = text[len(mark):]
    for number, line in enumerate(text.split('\n'), 1):
        line = line.rstrip('\r').lstrip()
        if not line or line.startswith('#'):
            continue

        name, equals, value = line.partition('=')
        refuse_if(not equals, 'line %d of it, `%s`, is not NAME=VALUE', number,
                  printable(name, 40))
        try:
            check_variable(name, value)
        except Failure as problem:
            raise Failure('line %d of it: %s', number, problem)
        pairs.append((name, value))
    return pairs

def changed_keys(before, after):
    """The keys of two configs that differ in their values, in their order."""
    return sorted(key for key in set(before) | set(after)
                  if before.get(key) != after.get(key))

Release = namedtuple('Release', '''
    app number plan commit branch by how time seconds failed turn revived
    image layers config port web healthcheck volumes addresses machines published job
    proxy procfile crontab part''')
Release.__new__.__defaults__ = (None,) * len(Release._fields)

# A numbered deployment of an app. What is None is not known yet, or not written down.
#
# number    from 1, never used again
# plan      whether it only shows what a push would change: it is never saved
# commit, branch          what was pushed, and where to
# by, how   who made it, a key or somebody at the server; `push`, `rebuild`, `config KEY`
# time      when, in seconds since 1970
# seconds   that the deploy took; None until it is through
# failed    why it never was live
# turn      higher, the later it became live; not in records of older versions
# revived   {'by': who, 'time': when} of the rollback that made it live the last time
# image     the id of its image
# layers    [id] of what its build made, or used again, on the way: see Docker.build
# config    what the host knew of the app then, {key: value}
# port      of a plain app, which it listens on; 0: it is a worker, or a job
# web       whether nginx passes requests to that port
# healthcheck  whether docker runs a HEALTHCHECK in its containers; None of a job, and in
#           older records
# volumes   of a plain app, [path] of each VOLUME
# addresses of a plain app, on our network: of each process that has one of its own
# machines  of an app that runs on several, [address] of each that may run it
# published the port by which each of these is asked; 0 of other apps
# job       its upstart.conf as it is installed; '' where it brings none
# proxy     its proxy file as it is installed, pushed or made; '' where it has none
# procfile  its Procfile as it was pushed; '' where it has none, None: it was not read
# crontab   its crontab as it was pushed; '' where it brings none
# part      the names of the containers that it is about, None for all; never saved

# What stands in a release for that which is known not to be there.
NOTHING = {'port': 0, 'web': False, 'volumes': [], 'addresses': [], 'machines': [],
           'published': 0, 'job': '', 'proxy': '', 'crontab': ''}

# What is written into job and proxy files besides what was pushed
MARK = '# dockhand: where requests go\n'
MADE = "# dockhand: %s's proxy file, made at each push; `dockhand proxy %s` prints one\n"

def headed(app, what, text):
    """A pushed file under our line, which one copied from the server has already."""
    line = "# dockhand: %s's %s, installed from its repository at each push\n" % (
        app, what)
    return text if text.startswith(line) else line + text

def is_ours(text, app):
    """Whether this text of a job or proxy file is one that dockhand wrote for this app;
    no text, None, is not."""
    return (text or '').startswith("# dockhand: %s's" % app)

def image_tag(release):
    return '%s:%s' % (release.app, 'plan' if release.plan else release.number)

def container_name(release):
    return '%s--%s' % (release.app, release.number)

def pushed_part(release):
    """What a release's proxy file says below our first line, as it was pushed or made."""
    return (release.proxy or '').partition('\n')[2]

def environment_of(release):
    """{name: value} of what a release finds in its environment: what config says, the
    commit, and its port where it may choose that."""
    variables = {'GIT_REV': release.commit}
    if release.web or release.port and release.config.get('domains') == 'none':
        variables['PORT'] = str(release.port)
    variables.update(variables_of(release.config))
    return variables

def environment_text(release):
    """The environment of a release as docker's --env-file has it: it holds lines."""
    variables = environment_of(release)
    return ''.join('%s=%s\n' % (name, variables[name]) for name in sorted(variables)
                   if not has_lines(variables[name]))

def long_variables(release):
    """The rest of it: what has several lines."""
    variables = environment_of(release)
    return dict((name, variables[name]) for name in variables
                if has_lines(variables[name]))

def is_made(release):
    """Whether its proxy file was made here, not pushed."""
    return (release.proxy or '').startswith(MADE % (release.app, release.app))

def names_of_config(release):
    """The host names that root set in `domains`, [] where the proxy file was pushed: one
    of these may be a name that another app's wildcard gets now."""
    return release.config.get('domains', '').split() if is_made(release) else []

# ---- Processes: what of an app runs by itself (pure functions) -------------------------
# From a Procfile to the processes of a release, a container each. Uses the record.

# The types that answer requests: that of a Procfile, and the one of an app without
FRONT = ('web', '')
# Those that other containers of a release are called after, APP--N--cron-ID
RESERVED_TYPES = {
    'run': 'another name is wanted',
    'cron': 'what runs at its time stands in a file `crontab`'}

# What has one of these is run by a shell, as Upstart does it with an `exec`.
SHELL_LETTERS = '[#~`!$^&*()=|\\\\{}[\\];"\'<>?]'
# What a shell does beside running one program: `exec` before that would be wrong.
COMPOUND = '[;&|(){}!\n]'
SHELL_WORDS = '''. : alias break case cd command continue eval exec exit export for if
    local read readonly return set shift source test time trap type ulimit umask unset
    until wait while'''.split()

# type: see FRONT; number: from 1 in a release's processes of that type; name: that of its
# container; command: [word], None for what the image says; address: of its own, or ''
Process = namedtuple('Process', 'type number name command address')

def parse_procfile(text):
    """The [(type, command)] of a Procfile; Failure by line."""
    commands = []
    for number, line in enumerate(text.split('\n'), 1):
        line = line.strip()
        if not line or line.startswith('#'):
            continue

        kind, colon, said = [part.strip() for part in line.partition(':')]
        place = 'Procfile:%d: ' % number
        is_type = re.match(PROCESS_TYPE + r'\Z', kind)
        refuse_if(not colon or not said or not is_type,
                  place + '`%s` is no `TYPE: COMMAND`, the type in lower case, as '
                  '`worker: ./work`', printable(line, 40))
        reason = RESERVED_TYPES.get(kind.partition('-')[0])
        refuse_if(reason, place + 'no process can be called %s: %s', kind, reason)
        refuse_if(kind in dict(commands), place + '%s is there already', kind)
        refuse_if(len(said) > COMMAND_LETTERS, place + 'longer than %d characters: put '
                  'that in a script of the image', COMMAND_LETTERS)
        commands.append((kind, said))

    refuse_if(not commands, 'Procfile: it names no process')
    return commands

def procfile_of(release):
    """The [(type, command)] of a release's Procfile, [] where it has none."""
    return parse_procfile(release.procfile) if release.procfile else []

def process_types(release):
    """The [(type, command)] of what of a release is to go on, `web` first; with '' and
    None for the one process of an app that its image says all of."""
    commands = [pair for pair in procfile_of(release) if pair[0] != 'release']
    commands.sort(key=lambda pair: pair[0] != 'web')
    return commands or [('', None)]

def has_web(release):
    """Whether its Procfile says that it answers requests."""
    return 'web' in dict(procfile_of(release))

def has_front(release):
    """Whether a release has a process that may answer requests."""
    return process_types(release)[0][0] in FRONT

def command_words(command):
    """A command of a Procfile, or a crontab, as docker gets it: [word]."""
    words = command.split()
    first = words[0]
    if not re.search(SHELL_LETTERS, command):
        if first == 'exec' and len(words) > 1:
            return words[1:]            # there is no shell whose place it could take
        return ['sh', '-c', command] if first in SHELL_WORDS else words

    is_compound = re.search(COMPOUND, command) or '=' in first or first in SHELL_WORDS
    # The program takes the place of the shell, so that a signal finds it.
    return ['sh', '-c', command if is_compound else 'exec ' + command]

def release_command(release):
    """(the release command as somebody wrote it, its [word]), or None. That of config
    goes before that of the Procfile."""
    import shlex
    if 'release' in release.config:
        said = release.config['release']
        return said, shlex.split(said)
    said = dict(procfile_of(release)).get('release')
    return (said, command_words(said)) if said else None

def scale_of(release):
    """{type: how many} as config says it."""
    words = release.config.get('scale', '').split()
    return dict((word.partition('=')[0], int(word.partition('=')[2])) for word in words)

def counted_types(release):
    """The [(type, command, how many)] of a release."""
    scale = scale_of(release)
    return [(kind, said, scale.get(kind or 'web', 1))
            for kind, said in process_types(release)]

def count_addresses(release):
    """How many of its processes have an address of their own. There is one at least: it
    says which network is meant."""
    return max([1] + [count for kind, _, count in counted_types(release)
                      if kind in FRONT])

def processes_of(release):
    """The [Process] of a release, or of the part of it that this is about."""
    processes = []
    for kind, said, count in counted_types(release):
        words = command_words(said) if said else None
        addresses = []
        if kind in FRONT:
            addresses = release.addresses or []     # not known before the build
        for number in range(1, count + 1):
            name = process_name(release, kind, number)
            address = ''.join(addresses[number - 1:number])
            processes.append(Process(kind, number, name, words, address))
    if release.part is not None:
        processes = [process for process in processes if process.name in release.part]
    return processes

def process_name(release, kind, number):
    """The name of a process's container."""
    name = container_name(release)
    if kind not in FRONT:
        name += '--' + kind
    return name if number == 1 else '%s--%d' % (name, number)

def part_of(release, names):
    """A release as far as it is in some containers."""
    return release._replace(part=tuple(names))

def front_of(release):
    """The part of a release that answers requests."""
    return part_of(release, [process.name for process in processes_of(release)
                             if process.type in FRONT])

def workers_of(release):
    """The rest of it."""
    return part_of(release, [process.name for process in processes_of(release)
                             if process.type not in FRONT])

def title_of(process):
    """What a person calls a process: `worker`, or the second one `worker.2`."""
    title = process.type or 'web'
    return title if process.number == 1 else '%s.%d' % (title, process.number)

# ---- Jobs: upstart.conf read and checked, its `docker run` understood (pure functions) -
# From the text of a job to its stanzas, their commands and the options of `docker run`,
# and what is wrong with them. No other section is needed, but for names.

# value: without comments and quotes; text: its first line; commands: of exec and script
Stanza = namedtuple('Stanza', 'name value text line commands')
# name: its first word, or `docker run`; words: from `run` on; ending: `;`, or `>> file`
Command = namedtuple('Command', 'name words ending')
Word = namedtuple('Word', 'text value line offset')         # value: without its quotes
Option = namedtuple('Option', 'name value word')            # of docker run; its long name
Token = namedtuple('Token', 'kind text line offset')        # kind: see SHELL_TOKEN

# The stanzas of init(5), as of Upstart 1.13, by the words that they begin with
AROUND = ('pre-start', 'post-start', 'pre-stop', 'post-stop')
EXECS = ('exec',) + tuple(name + ' exec' for name in AROUND)
SCRIPTS = ('script',) + tuple(name + ' script' for name in AROUND)
CONDITIONS = ('start on', 'stop on')
OTHER_STANZAS = ('kill signal', 'kill timeout', 'normal exit', 'reload signal')
STANZAS = set('''apparmor author cgroup chdir chroot console debug description emits env
    expect export instance limit manual nice oom respawn setgid setuid task umask usage
    version'''.split()).union(EXECS, SCRIPTS, CONDITIONS, OTHER_STANZAS)

UPSTART_ONLY = 'note: under Upstart'    # how a doubt begins that is none in docker

# What kills a deploy, and notes: names of stanzas or options, and with which beginning of
# their value that is so: '' with any, \Z with none, (?![fF0]) with a flag that is not off
JOB_CHECKS = [
    (['exec'], r'\Z', 'a command is wanted'),
    (['kill timeout'], r'(?!\d+\Z)', 'a number of seconds is wanted'),
    (['kill signal'], r'\d', 'a number crashes init 1.5; write its name, as in SIGINT'),
    (['task'], '', 'dockhand runs services that go on; use cron for what ends'),
    (['instance'], '', 'one app is one service; push it under several names'),
    (['expect'], r'(?!none\Z)',
     'docker run does not fork, init would wait on; remove it'),
    (SCRIPTS, r'[^\r]*\r', 'sh takes Windows line ends for text; use Unix ones'),
    (['start on'], r'(?s).*filesystem\s+and\s+started\s+docker',
     UPSTART_ONLY + ' lost when docker restarts; `start on started docker`, `stop on '
     'stopping docker` is not'),
    (['--detach'], r'(?![fF0])', 'a detached container init cannot watch; remove it'),
    (['--interactive', '--tty'], r'(?![fF0])', 'a service has no terminal; remove it'),
    (['--lxc-conf'], '', 'docker has had no such option since 1.10; remove it'),
    (['--name'], r'.?\Z', 'docker wants a name of two characters at least')]

# Options of `docker run` that take no value, and the letters for those with and without.
FLAGS = set('''detach disable-content-trust help init interactive no-healthcheck quiet rm
    oom-kill-disable privileged publish-all read-only sig-proxy tty
    use-api-socket'''.split())
LETTERS = dict(zip('acdehilmpPqtuvw', '''attach cpu-shares detach env hostname interactive
    label memory publish publish-all quiet tty user volume workdir'''.split()))
SINGLE_DASH = set('''rm name sig-proxy privileged cidfile entrypoint link expose dns
    volumes-from lxc-conf'''.split())       # with one dash before docker 1.10
SHELL_TOKEN = r'''(?xs)
    (?P<blank>[ \t\r]+|\\\r?\n)
  | (?P<comment>\#[^\n]*)
  | (?P<operator>\n|[;&|()]+|\Z)
  | (?P<redirect>\d*[<>]+&?[ \t]*[^\s;&|<>()"'\\]*)
  | (?P<word>(?:\\.|"(?:\\.|[^"\\])*"|'[^']*'|\$\([^()]*\)|`[^`]*`|[^\s;&|<>()"'])+)
  | (?P<stray>.)'''
# What matters in a condition: its parentheses, but not those in quotes or a comment
CONDITION_TOKEN = r'''(?xs)
    \\. | "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' | \#[^\n]* | [()]'''
QUOTED = r"""(?xs)
    '(?P<single>[^']*)'
  | \\(?P<escaped>.)
  | "(?P<double>(?:\\.|[^"\\])*)"
  | (?P<bare>[^'"\\]+)"""
VARIABLE = r'\\(?P<escaped>[$`"\\])|\$(?P<brace>\{)?(?P<name>\w+)(?(brace)\})|[$`]'

def line_at(match):
    return match.string.count('\n', 0, match.start()) + 1

def parse_job(text):
    """The text of an upstart.conf as [Stanza]; Failure by line where init balks."""
    return JobReader(text).read()

class JobReader(object):
    """Reads an upstart.conf in one pass, line by line.

    A stanza is a line. It goes on where the line ends with a backslash, and `start on`
    and `stop on` also where a parenthesis is open. A script goes on to `end script`.
    """
    def __init__(self, text):
        self.lines = text.split('\n')
        self.number = 0         # of the line that was taken last; the first has 1
        self.offset = 0         # where in the text the line after that begins

    def read(self):
        stanzas = []
        while not self.is_at_end():
            line = self.take_line()
            if not is_blank(line):
                stanzas.append(self.take_stanza(line))
        return stanzas

    def is_at_end(self):
        return self.number == len(self.lines)

    def take_line(self):
        line = self.lines[self.number]
        self.number += 1
        self.offset += len(line) + 1
        return line

    def take_stanza(self, line):
        """The Stanza that begins with this line, or Failure."""
        number = self.number
        name, rest = split_stanza(line)

        tokens = None
        if name in SCRIPTS:
            tokens = self.take_script(rest)
        elif name is not None:
            tokens = self.take_value(name, rest)

        if tokens is None:
            raise Failure('upstart.conf:%d: `%s`: an unknown stanza, or a script without '
                          '`end script`', number, printable(line.strip()))
        return stanza_of(name, tokens, line.strip())

    def take_script(self, rest):
        """[Token] of the lines of a script; None where its end is missing.
        rest: what stands behind the word `script`"""
        if not is_blank(rest):
            return None
        number = self.number + 1
        offset = self.offset

        lines = []
        while not self.is_at_end():
            line = self.take_line()
            if is_end_of_script(line):
                return shell_tokens(''.join(lines), number, offset)
            lines.append(line + '\n')
        return None

    def take_value(self, name, rest):
        """[Token] of what follows the name of a stanza that is no script.
        rest: what stands behind the name in its line"""
        number = self.number
        offset = self.offset - len(rest) - 1
        if name in CONDITIONS:
            value = self.take_condition(rest)
        else:
            value = self.take_continued(rest)

        tokens = shell_tokens(value.rstrip(' \t\r'), number, offset)
        if name not in CONDITIONS:
            kinds = set(token.kind for token in tokens)
            refuse_if('stray' in kinds, 'upstart.conf:%d: a quote is not closed', number)
        return tokens

    def take_condition(self, rest):
        """What is left of a line, and the lines after it while a parenthesis is open."""
        number = self.number
        parts = [self.take_continued(rest)]

        depth = open_parentheses(parts[0], 0)
        while depth > 0:
            refuse_if(self.is_at_end(), 'upstart.conf:%d: a parenthesis is not closed',
                      number)
            parts.append(self.take_continued(self.take_line()))
            depth = open_parentheses(parts[-1], depth)
        return '\n'.join(parts)

    def take_continued(self, rest):
        """What is left of a line, and the lines after it while a backslash ends one."""
        parts = [rest]
        while parts[-1].endswith(('\\', '\\\r')) and not self.is_at_end():
            parts.append(self.take_line())
        return '\n'.join(parts)

def is_blank(line):
    """Whether there is nothing in a line, or a comment alone."""
    line = line.lstrip(' \t\r')
    return not line or line.startswith('#')

def is_end_of_script(line):
    match = re.match(r'[ \t]*end[ \t]+script', line)
    return match is not None and is_blank(line[match.end():])

def split_stanza(line):
    """(name, what follows it) of a line; (None, the line) where init knows no such."""
    match = re.match(r'[ \t]*([\w-]+)([ \t]+[\w-]+)?', line)
    if match is None:
        return None, line

    first, second = match.groups('')
    if first in STANZAS:
        return first, line[match.end(1):]
    name = first + ' ' + second.strip(' \t')
    if name in STANZAS:
        return name, line[match.end():]
    return None, line

def open_parentheses(text, depth):
    """How many parentheses are open behind a text, if so many are before it."""
    for part in re.findall(CONDITION_TOKEN, text):
        if part == '(':
            depth += 1
        elif part == ')' and depth > 0:
            depth -= 1
    return depth

def shell_tokens(text, line, offset):
    """[Token] of a text that begins in this line, so far behind the file's beginning.
    They are the whole text; the last one is an operator without letters."""
    tokens = []
    for match in re.finditer(SHELL_TOKEN, text):
        part = match.group()
        tokens.append(Token(match.lastgroup, part, line, offset + match.start()))
        line += part.count('\n')
    return tokens

def stanza_of(name, tokens, first_line):
    """The Stanza of a name and the [Token] of what follows it."""
    plain = ''.join(token.text for token in tokens if token.kind != 'comment')
    value = unquote(plain.strip(' \t\n'))
    commands = []
    if name in EXECS or name in SCRIPTS:
        commands = read_commands(tokens)
    return Stanza(name, value, first_line, tokens[0].line, commands)

def read_commands(tokens):
    """[Command] of the [Token] of an exec or a script."""
    commands = []
    words = []
    redirect = ''

    for token in tokens:
        if token.kind in ('word', 'stray'):
            value = unquote(token.text)
            words.append(Word(token.text, value, token.line, token.offset))
        elif token.kind == 'redirect':
            redirect = token.text
        elif token.kind == 'operator' and words:
            commands.append(read_command(words, redirect or token.text))
            words = []
            redirect = ''
    return commands

def read_command(words, ending):
    """The Command of the words of one; docker's is named for docker's verb."""
    verb = docker_verb([word.value for word in words])
    if verb is None:
        return Command(words[0].text, words, ending)
    return Command('docker ' + words[verb].value, words[verb:], ending)

# What may stand before a command, and which options before docker's verb have a value
BEFORE_COMMANDS = ('exec', 'sudo', 'then', 'do', 'else', '!', '{')
DOCKER_VALUES = ('-H', '--host', '-c', '--context', '--config', '-l', '--log-level')

def comes_before_command(value):
    """Whether a word is none of a command: `exec`, or a variable that is set for it."""
    return value in BEFORE_COMMANDS or re.match(r'\w+=', value) is not None

def docker_verb(values):
    """Which of the words of a command is docker's verb, as in `docker -D run`, counted
    from 0; None in other commands."""
    at = 0
    last = len(values) - 1
    while at < last and comes_before_command(values[at]):
        at += 1
    is_docker = values[at] == 'docker' or values[at].endswith('/docker')
    if not is_docker or at == last:
        return None

    at += 1
    while at < last and values[at].startswith('-'):
        at += 2 if values[at] in DOCKER_VALUES else 1
    if at < last and values[at] == 'container':
        at += 1
    return min(at, last)

def unescaped(match):
    """What a match of VARIABLE says where no variable is known."""
    return match.group('escaped') or match.group()

def unquote(text, variable=unescaped):
    """A text without its quotes; `variable` gives the value of a match of VARIABLE."""
    def part(match):
        kind = match.lastgroup
        if kind in ('single', 'escaped'):
            return match.group(kind)
        return re.sub(VARIABLE, variable, match.group(kind))
    return re.sub(QUOTED, part, text)

def read_run(words):
    """`run` and what follows it, as ([Option], [Word]): from the image on it is words."""
    rest = deque(words)
    run = rest.popleft()
    options, rest = take_options(rest)
    refuse_if(not rest, 'upstart.conf:%d: `docker run` names no image', run.line)
    return options, rest

def take_options(rest):
    """The [Option] that some words begin with, and the words behind them. rest: a deque
    of [Word]"""
    options = []
    while rest and is_option(rest[0].value):
        word = rest.popleft()
        if word.value == '--':
            break
        for name, value in split_option(word.value):
            if value is None and name not in FLAGS and rest:
                value = rest.popleft().value
            options.append(Option(name, value or '', word))
    return options, list(rest)

def is_option(text):
    return re.match('-.', text) is not None

def split_option(text):
    """[(long name, value or None)] of one word: --name=x, -rm, -itp80:80."""
    name, equals, value = text.lstrip('-').partition('=')
    if text.startswith('--') or name in SINGLE_DASH:
        return [(name, value if equals else None)]
    return split_letters(text[1:])

def split_letters(letters):
    """The same of the letters behind one dash: flags, and then perhaps one that takes
    the rest for its value, which may have a `=` before it."""
    options = []
    for at, letter in enumerate(letters):
        name = LETTERS.get(letter, letter)
        following = letters[at + 1:at + 2]

        if name not in FLAGS or following in ('', '='):
            value = letters[at + 1:].lstrip('=')
            return options + [(name, value or None)]
        options.append((name, None))
    return options

def main_of(job):
    """The Stanza of the main process in a list; [] where there is none."""
    mains = [stanza for stanza in job if stanza.name in ('exec', 'script')]
    return mains[-1:]

def runs_of(job):
    """Every `docker run` of the main process, as read_run gives it."""
    runs = []
    for stanza in main_of(job):
        for part in stanza.commands:
            if part.name == 'docker run':
                runs.append(read_run(part.words))
    return runs

def options_of(job):
    return [option for options, _ in runs_of(job) for option in options]

def job_of(release):
    return parse_job(release.job.partition('\n')[2])    # lines count as they were pushed

def modernize_job(text):
    """(text, [old words]): docker's old single-dash options get their second dash."""
    old = []
    for option in options_of(parse_job(text)):
        word = option.word
        if option.name in SINGLE_DASH and not word.value.startswith('--'):
            old.append(word)

    parts = []
    end = 0
    for word in old:
        parts.append(text[end:word.offset])
        end = word.offset
    parts.append(text[end:])
    return '-'.join(parts), [word.text for word in old]

def published_ports(job):
    return [option.value for option in options_of(job) if option.name == 'publish']

def check_job(job, app, proxied=(), volumes=()):
    """What is doubtful, as [(line, text)]; Failure for what is known to kill a deploy.
    proxied: the host's ports in the app's proxy file; volumes: the image's VOLUMEs"""
    refuse_if(not main_of(job), 'upstart.conf:1: no `exec` or `script`: say how to run '
              'the app, as in `exec docker run --rm %s`', app)

    doubts = []
    for place, said in problems_of_job(job, app, proxied, volumes):
        if not said.startswith(('note: ', 'warning: ')):
            raise Failure('upstart.conf:%d: `%s`: %s', place.line, printable(place.text),
                          said)
        doubts.append((place.line, said))
    return doubts

def problems_of_job(job, app, proxied, volumes):
    """What is wrong with a job, as (Stanza or Word, text); doubts have a prefix."""
    runs = runs_of(job)
    for stanza in job:
        for said in value_problems(stanza.name, stanza.value):
            yield stanza, said
    for options, _ in runs:
        for option in options:
            for said in value_problems('--' + option.name, option.value):
                yield option.word, said

    removed = removed_containers(job)
    for options, words in runs:
        problems = foreign_name_problems(options, app)
        problems += taken_name_problems(options, removed)
        problems += port_problems(options, proxied)
        problems += image_problems(options, words[0], app, volumes)
        for problem in problems:
            yield problem

def value_problems(name, value):
    """The texts of JOB_CHECKS for a stanza, or an option with its dashes."""
    return [said for names, pattern, said in JOB_CHECKS
            if name in names and re.match(pattern, value)]

def removed_containers(job):
    """The set of words after `docker rm`, in whichever process of a job."""
    removed = set()
    for stanza in job:
        for part in stanza.commands:
            if part.name == 'docker rm':
                removed.update(word.value for word in part.words[1:])
    return removed

def taken_name_problems(options, removed):
    """[(Word, text)] for a name that the last start has left to a container.
    removed: the containers that the job removes"""
    removes_itself = any(name == 'rm' and value[:1] not in ('f', 'F', '0')
                         for name, value, _ in options)
    may_remove_any = any('$' in name for name in removed)
    if removes_itself or may_remove_any:
        return []

    names = [(value, word) for name, value, word in options if name == 'name']
    return [(word, 'without --rm the next start finds this name taken; add --rm')
            for value, word in names if value not in removed]

def port_problems(options, proxied):
    """[(Word, text)] for each port of a web server that the whole world reaches."""
    problems = []
    for name, value, word in options:
        if name == 'publish':
            outside, inside = open_port(value)

            if outside in proxied or inside in HTTP_PORTS:
                problems.append((word, 'warning: `-p %s` is open to the world, past ufw; '
                                 'behind nginx: `-p 127.0.0.1:%s:%s`'
                                 % (value, outside or inside, inside)))
    return problems

def open_port(value):
    """(port of the host, port of the container) of `-p [PORT:]PORT[/tcp]`, '' for what
    is not given; both are '' where an address is named, `0.0.0.0:` too: who writes that
    means it; and for another protocol."""
    outside, _, inside = value.rpartition(':')
    port, slash, protocol = inside.partition('/')
    if ':' in outside or (slash and protocol != 'tcp'):
        return '', ''
    return outside, port

def image_problems(options, image, app, volumes):
    """[(Word, text)] for another image than the app's, or data that outlives no stop.
    image: the Word; volumes: the VOLUMEs of the app's image"""
    if not is_image_of(app, image.value):
        return [(image, 'warning: it runs the image `%s`, not what this repository '
                 'builds, `%s`' % (printable(image.value), app))]
    if any(name == 'volumes-from' for name, _, _ in options):
        return []

    mounted = set(mounted_path(name, value) for name, value, _ in options)
    lost = set(path.rstrip('/') for path in volumes) - mounted
    return [(image, 'warning: VOLUME %s is mounted nowhere, its data goes at every '
             'stop; to keep it: `-v /srv/%s%s:%s`' % (path, app, path, path))
            for path in sorted(lost)]

def mounted_path(name, value):
    """Where in the container an option of `docker run` mounts something, or None.
    The forms: --volume [FROM:]PATH[:MODE], --tmpfs PATH[:MODE], --mount KEY=VALUE,..."""
    path = None
    if name == 'volume':
        parts = value.split(':')
        has_source = len(parts) > 1 and parts[1].startswith('/')
        path = parts[1] if has_source else parts[0]

    elif name == 'tmpfs':
        path = value.partition(':')[0]
    elif name == 'mount':
        for field in value.split(','):
            key, _, said = field.partition('=')
            if key in ('dst', 'destination', 'target'):
                path = said

    return path and path.rstrip('/')

NAMING = ('name', 'net-alias', 'network-alias', 'ip')

def foreign_name_problems(options, app):
    """[(Word, text)] for each name on our network that is not the app's own."""
    return [(word, 'on the network %s only the app %s answers to that: leave out `%s`'
             % (NETWORK, printable(value), printable(value)))
            for word, value in foreign_names(options, app)]

def foreign_names(options, app):
    """[(Word, value)] of what a `docker run` would answer to on our network, where other
    apps ask for apps by name: nothing but the app's own name, and no fixed address."""
    joins_ours = False
    answers_to = []
    for name, value, word in options:
        if name in ('net', 'network'):
            fields = [field.partition('=') for field in value.split(',')]
            network = dict((key, said) for key, _, said in fields).get('name', value)
            joins_ours = joins_ours or network in (NETWORK, OVERLAY)
            for key, equals, said in fields:
                if equals and key in ('alias', 'ip'):
                    answers_to.append((word, said))

        elif name in NAMING:
            answers_to.append((word, value))

    if not joins_ours:
        return []
    if '.' in app:                  # not even its own: see plain_container
        return answers_to
    return [(word, value) for word, value in answers_to if value != app]

def is_image_of(app, image):
    return image in (app, app + ':latest')

# ---- Containers described: what docker is told of an app (pure functions) --------------
# What `docker create` gets for a release: from its job, or from its Dockerfile. Uses
# "Jobs" and the record.

# How docker keeps a job running: what `docker create` gets, and where it is to run.
Container = namedtuple('Container', 'options image command env folder at_boot grace')

# Options that docker itself makes up for, and commands beside `docker run` that are not
# run where docker runs the app: it does that by itself, or they have no effect.
DROPPED = ('attach', 'cidfile', 'detach', 'detach-keys', 'interactive', 'name', 'pull',
           'quiet', 'restart', 'rm', 'sig-proxy', 'tty')
LEFT_OUT = ('docker rm', 'docker stop', 'docker kill', 'docker pull', 'true', ':', 'set',
            'sleep', 'echo', 'exit')

def container_of(job, app):
    """The Container that does what the job says; Failure by line where none does."""
    last = dict((stanza.name, stanza.value) for stanza in job)
    env = dict(stanza.value.partition('=')[::2] for stanza in job
               if stanza.name == 'env')
    expanded = []
    for word in only_run(job, app).words:
        expanded.extend(expand_word(word, env))
    options, words = read_run(expanded)

    given = [long_option(option) for option in options if option.name not in DROPPED]
    if 'kill signal' in last:
        given.append('--stop-signal=' + last['kill signal'])

    arguments = [word.value for word in words[1:]]
    return Container(given, words[0].value, arguments, env, last.get('chdir', '/'),
                     starts_at_boot(job), last.get('kill timeout', '5'))

def long_option(option):
    """An Option in one word, as `docker create` takes it."""
    if option.name in FLAGS and not option.value:
        return '--' + option.name
    return '--%s=%s' % (option.name, option.value)

def starts_at_boot(job):
    """Whether a job says when it starts: a later `manual` takes that back."""
    starts = [stanza.name for stanza in job if stanza.name in ('start on', 'manual')]
    return starts[-1:] == ['start on']

def volume_of(app, path):
    """The name of the docker volume that keeps a VOLUME of an app: shop--var_lib_data."""
    def escaped(match):
        return '_' if match.group() == '/' else '_%02x_' % ord(match.group())
    return '%s--%s' % (app, re.sub(r'[^A-Za-z0-9.-]', escaped, path.strip('/')))

def gateway_of(address):
    """The server itself, as a container with an address on our network reaches it."""
    return address.rsplit('.', 2)[0] + '.0.1'

def plain_container(release, process, env_file):
    """The Container of a process of a plain app: it runs as its Dockerfile, its Procfile
    and config say."""
    app = release.app
    env = long_variables(release)
    options = ['--net=' + NETWORK]
    if process.address:
        options.append('--ip=' + process.address)
    # With a dot it would stand in the way of a real site of that name.
    if process.type in FRONT and '.' not in app:
        options.append('--net-alias=' + app)
    options.append('--env-file=' + env_file)
    options += ['--env=' + name for name in sorted(env)]
    # Docker's own word for the server, `host-gateway`, wants its version 20.10.
    gateway = gateway_of(release.addresses[0])
    options.append('--add-host=host.docker.internal:' + gateway)

    own = own_options(release)
    mounted = set(mounted_path(option.name, option.value) for option in own)
    options += ['--volume=%s:%s' % (volume_of(app, path), path)
                for path in release.volumes if path.rstrip('/') not in mounted]
    own = [long_option(option) for option in own]
    is_first = process.type in FRONT and process.number == 1
    options += own if is_first else without_places(own)
    return Container(options, app, command=process.command or [], env=env, folder='/',
                     at_boot=True, grace=grace_of(release))

# Options of `docker create` that dockhand says itself, and why
OURS = dict.fromkeys(['attach', 'detach', 'interactive', 'tty', 'sig-proxy', 'rm',
                      'detach-keys', 'help', 'quiet'], 'a service runs by itself')
OURS.update(dict.fromkeys(['net', 'network', 'ip', 'ip6', 'link-local-ip', 'net-alias',
                           'network-alias', 'link'],
                          'the apps are on one network, where each has its name'))
OURS.update({
    'name': 'dockhand names the containers', 'cidfile': 'dockhand names the containers',
    'restart': 'docker starts them again, until dockhand stop',
    'pull': 'the image is what was pushed', 'platform': 'the image is what was pushed',
    'publish-all': 'say which: -p PORT:PORT',
    'volumes-from': 'mount what is wanted: -v /srv/data:/data',
    'label-file': 'some labels are dockhand\'s: --label'})

def read_options(text):
    """The [Option] of config's `options`; Failure for a word that cannot be one."""
    import shlex
    words = [Word(word, word, 0, 0) for word in shlex.split(text)]
    options, rest = take_options(deque(words))
    others = rest + [word for word in words if word.value == '--']
    for word in others:
        raise Failure('options: `%s` is no option, which begins with a dash',
                      printable(word.value))

    for option in options:
        refuse_if(option.name in OURS, 'options: leave out `%s`: %s',
                  printable(option.word.value), OURS.get(option.name))
        refuse_if(option.name == 'label' and option.value.startswith('dockhand'),
                  'options: leave out `%s`: dockhand\'s own labels begin like this',
                  printable(option.value))
        joins_another = option.value.startswith('container:')
        refuse_if(option.name in ('pid', 'ipc') and joins_another, 'options: leave out '
                  '`--%s=%s`: it reaches into another app, and ends with that',
                  option.name, printable(option.value))
        is_number = re.match('[0-9]{1,4}\\Z', option.value)
        refuse_if(option.name == 'stop-timeout' and not is_number, 'options: '
                  '--stop-timeout wants a number of seconds, 9999 at most')
    return options

def own_options(release):
    """The [Option] that config has for a release."""
    text = release.config.get('options')
    return read_options(text) if text else []

def grace_of(release):
    """How many seconds a stop may take, a str."""
    given = [option.value for option in own_options(release)
             if option.name == 'stop-timeout']
    return given[-1] if given else '10'

LOG_CAP = ['--log-driver=json-file', '--log-opt=max-size=10m', '--log-opt=max-file=3']
PIDS_CAP = '--pids-limit=4096'      # or a fork bomb in one app takes the host

# What an option is called by `docker service create`: these alone can be had there
SAME_FOR_SERVICES = '''cap-add cap-drop dns dns-option dns-search entrypoint env env-file
    health-cmd health-interval health-retries health-start-period health-timeout hostname
    init log-driver log-opt mount no-healthcheck read-only stop-signal sysctl ulimit user
    workdir'''.split()
FOR_SERVICES = dict(zip(SAME_FOR_SERVICES, SAME_FOR_SERVICES))
FOR_SERVICES.update({
    'add-host': 'host', 'cpus': 'limit-cpu', 'dns-opt': 'dns-option',
    'group-add': 'group', 'label': 'container-label', 'memory': 'limit-memory',
    'memory-reservation': 'reserve-memory', 'pids-limit': 'limit-pids',
    'stop-timeout': 'stop-grace-period'})

def service_option(option):
    """An Option of `docker create` in one word of `docker service create`; Failure for
    one that holds on this server alone."""
    name = FOR_SERVICES.get(option.name)
    is_tied = bool(mounts_of([option])) or name is None
    refuse_if(is_tied, 'options: `%s` cannot be had on several machines: leave it out, '
              'or unset machines', printable(long_option(option)))
    if name == 'stop-grace-period':
        return '--%s=%ss' % (name, option.value)
    return long_option(option._replace(name=name))

def service_words(release, env_file, front, init):
    """What `docker service create` gets for the web process of a release, and the
    variables that these words name: ([word], {name: value}). It runs nothing yet.
    front: the address of this server; init: whether docker has one for containers"""
    app = release.app
    process = processes_of(front_of(release))[0]
    env = long_variables(release)
    network = 'name=' + OVERLAY
    # With a dot it would stand in the way of a real site of that name.
    if '.' not in app:
        network += ',alias=' + app
    words = ['--name=' + service_name(process), '--replicas=0', '--detach',
             '--no-resolve-image', '--endpoint-mode=dnsrr', '--network=' + network,
             '--publish=mode=host,target=%d,published=%d' % (release.port,
                                                            release.published),
             '--constraint=node.labels.%s==%s' % (machine_label(release), release.image),
             '--restart-condition=any', '--restart-delay=1s',
             '--label=dockhand.app=' + app, '--container-label=dockhand.app=' + app,
             '--host=host.docker.internal:' + front, '--env-file=' + env_file]
    words += ['--env=' + name for name in sorted(env)]
    if init:
        words.append('--init')

    given = [service_option(option) for option in own_options(release)]
    words += given
    if not any(word.startswith('--log-') for word in given):
        words += LOG_CAP
    if not any(word.startswith('--limit-pids') for word in given):
        words.append(PIDS_CAP.replace('--pids-limit', '--limit-pids'))
    return words + [release.image] + (process.command or []), env

def service_name(process):
    """What the service of a process is called: as its container would be, but that no
    service may have a dot in its name."""
    return process.name.replace('.', '-_')

def app_of_service(name):
    """The app whose service, or a task of it, is called so."""
    return name.rpartition('--')[0].replace('-_', '.')

def machine_label(release):
    """The label of a machine that has the image of a release; its value is the id."""
    return 'dockhand.%s.%d' % (release.app, release.number)

def read_machine_label(label):
    """(app, number) of such a label, or None."""
    match = re.match(r'dockhand\.(.+)\.([0-9]+)\Z', label)
    return (match.group(1), int(match.group(2))) if match else None

# Options of `docker build` that config may have: those with a value, and those without
BUILD_OPTIONS = '''add-host build-arg file label network platform secret shm-size target
    ulimit'''.split()
BUILD_FLAGS = ['no-cache', 'pull']

def read_build(text):
    """The [Option] of config's `build`; Failure for a word that is none of ours."""
    import shlex
    options = []
    words = deque(shlex.split(text))
    while words:
        word = words.popleft()
        name, equals, value = word.partition('=')
        if word.startswith('-f'):
            name, equals, value = '--file', word[2:], word[2:].lstrip('=')
        name = name[2:] if name.startswith('--') else ''

        refuse_if(name not in BUILD_OPTIONS + BUILD_FLAGS, 'build: `%s` is not taken; '
                  'these are: -f --%s', printable(word),
                  ' --'.join(sorted(BUILD_FLAGS + BUILD_OPTIONS)))
        if name in BUILD_OPTIONS and not equals:
            refuse_if(not words, 'build: `%s` wants a value', word)
            value = words.popleft()
        option = Option(name, value, word)
        check_build_option(option)
        options.append(option)
    return options

def check_build_option(option):
    """Failure for an Option of `docker build` that reads or writes what only root may, or
    that nothing can follow."""
    name, value = option.name, option.value
    refuse_if(name == 'file' and not is_folder(value), 'build: -f wants the path of a '
              'file of the repository, as docker/prod.Dockerfile')
    refuse_if(name == 'network' and value not in ('default', 'none', 'host'),
              'build: --network wants default, none or host')
    refuse_if(name == 'label' and value.startswith('dockhand'), 'build: leave out `%s`: '
              "dockhand's own labels begin like this", printable(value))
    if name == 'secret':
        said = dict(field.partition('=')[::2] for field in value.split(','))
        is_known = set(said) <= set(['id', 'env', 'type'])
        is_variable = said.get('type', 'env') == 'env'
        is_whole = said.get('id') and said.get('env')
        refuse_if(not (is_known and is_variable and is_whole),
                  'build: `--secret %s`: write --secret id=NAME,env=VARIABLE',
                  printable(value))

    for variable in variables_named([option]):
        check_variable(variable, '')
        refuse_if(steers_docker(variable), 'build: docker itself would go by `%s`: the '
                  'variable wants another name', variable)

def variables_named(options):
    """The variables that some [Option] of `docker build` take their values from."""
    names = []
    for option in options:
        if option.name == 'build-arg' and '=' not in option.value:
            names.append(option.value)
        if option.name == 'secret':
            fields = [field.partition('=') for field in option.value.split(',')]
            names += [said for key, _, said in fields if key == 'env']
    return names

def build_options(config):
    """The [Option] of `docker build` in a config."""
    return read_build(config['build']) if 'build' in config else []

def dockerfile_of(config):
    """Where the Dockerfile is, as config says it."""
    named = [option.value for option in build_options(config) if option.name == 'file']
    return named[-1] if named else 'Dockerfile'

def is_built_alike(before, after):
    """Whether two configs make the same image of a commit."""
    if before.get('build') != after.get('build'):
        return False
    if before.get('folder') != after.get('folder'):
        return False

    was = variables_of(before)
    now = variables_of(after)
    return all(was.get(name) == now.get(name)
               for name in variables_named(build_options(after)))

# What an option mounts. source: a path, the name of a volume, or ''
Mount = namedtuple('Mount', 'source is_read_only')

def mounts_of(options):
    """The [Mount] of some [Option]; what only the container itself has is none."""
    mounts = []
    for option in options:
        if option.name == 'volume':
            parts = option.value.split(':')
            modes = parts[2].split(',') if parts[2:] else []
            if parts[1:]:
                mounts.append(Mount(parts[0], 'ro' in modes))
        elif option.name == 'mount':
            mounts.extend(mounts_of_fields(option.value))
    return mounts

def mounts_of_fields(value):
    """The [Mount] of a --mount: KEY=VALUE,... as CSV; a volume may be a path in disguise,
    by an option of its driver."""
    import csv
    mounts = []
    fields = [field.partition('=') for field in next(csv.reader([value]), [])]
    said = dict((key.strip().lower(), text) for key, _, text in fields)
    read_only = [said[key] for key in ('ro', 'readonly') if key in said]
    is_read_only = bool(read_only) and read_only[0] in ('', '1', 'true')

    source = said.get('source', said.get('src', ''))
    if source:
        mounts.append(Mount(source, is_read_only))
    for key, _, text in fields:
        option, _, path = text.partition('=')
        if key.strip().lower() == 'volume-opt' and option == 'device':
            mounts.append(Mount(path, is_read_only))
    return mounts

def mounts_of_release(release):
    """The [Mount] that a release says itself, beside the VOLUMEs of its image."""
    return mounts_of(options_of(job_of(release)) if release.job else own_options(release))

def has_places(release):
    """Whether two of a release cannot run at once: they would share a port, or data."""
    options = own_options(release)
    publishes = any(option.name == 'publish' for option in options)
    return publishes or any(not mount.is_read_only for mount in mounts_of(options))

WEB_PORT = 5000         # of a `web` that neither EXPOSE nor config says more of

def read_image(settings, release):
    """(port or 0, whether it is for nginx, [volume path]) by the Config of an image, and
    what a release says: its config, its Procfile, its own proxy file if it has one."""
    config = release.config
    listed = settings.get('ExposedPorts') or {}
    exposed = [port.split('/')[0] for port in listed if port.endswith('/tcp')]
    web_ports = [port for port in WEB_PORTS if port in exposed]
    exposed = sorted(int(port) for port in exposed)

    if config.get('port') == 'none' or not has_front(release):
        port = 0
    elif 'port' in config:
        port = int(config['port'])
    elif web_ports:
        port = int(web_ports[0])
    elif exposed:
        port = exposed[0]
    else:
        port = WEB_PORT if has_web(release) else 0

    wanted = bool(web_ports or 'port' in config or has_web(release) or release.proxy)
    is_web = port != 0 and wanted and config.get('domains') != 'none'
    return port, is_web, sorted(settings.get('Volumes') or {})

def has_healthcheck(settings, release):
    """Whether docker may run a HEALTHCHECK in the containers of a release, by the Config
    of its image and config's `options`."""
    options = read_options(release.config.get('options', ''))
    if any(option.name.startswith('health') for option in options):
        return True
    test = (settings.get('Healthcheck') or {}).get('Test') or ['NONE']
    return test[0] != 'NONE'

def refuse_here_if(wrong, place, what, remedy):
    """Failure for a Stanza or a Word that only init could follow."""
    refuse_if(wrong, 'upstart.conf:%d: `%s` cannot be had where docker instead of '
              'Upstart runs the app, as here: %s', place.line, printable(what), remedy)

def only_run(job, app):
    """The one `docker run` of a job, whose other commands can be left out."""
    process = main_of(job)[0]
    runs = [part for part in process.commands if part.name == 'docker run']
    refuse_here_if(len(runs) != 1, process, process.name, 'it must hold one `docker run`')
    run = runs[0]

    ending = run.ending.strip('\n;')
    refuse_here_if(ending not in ('', '||', '&&'), run.words[0], ending,
                   'docker keeps what it prints: dockhand logs ' + app)
    for stanza in job:
        refuse_here_if(stanza.name in ('chroot', 'normal exit'), stanza, stanza.name,
                       'remove it')
        if stanza is process or stanza.name.startswith(AROUND):
            check_commands(stanza.commands, run)
    return run

def check_commands(commands, run):
    """Failure for one that cannot be left out beside the `docker run`."""
    for part in commands:
        is_known = part is run or part.name in LEFT_OUT
        refuse_here_if(not is_known or part.ending == '|', part.words[0],
                       part.name, 'do it in the Dockerfile or in what it starts')

def expand_word(word, env):
    """[Word] for a Word, `$NAME` of the job's own env put in as the shell would."""
    refuse_here_if(word.text in ('"', "'"), word, word.text, 'the quote is not closed')

    def variable(match):
        if match.group('escaped'):
            return match.group('escaped')
        name = match.group('name')
        refuse_here_if(name not in env, word, word.text,
                       'only the `env` of the job is known')
        return env[name]
    value = unquote(word.text, variable)

    # A variable that stands alone and without quotes may be several words, or none.
    if re.match(r'\$\{?\w+\}?\Z', word.text):
        return [word._replace(value=part) for part in value.split()]
    return [word._replace(value=value)]

# ---- Crontabs (pure functions) ---------------------------------------------------------
# What of an app runs at its times: the pushed crontab, read by line; the file that has
# cron call us; and the sh that it calls, which needs no dockhand. Uses "Processes".

# when: five fields, or @daily; command: as it was pushed, cron's own `\%` undone; line:
# where, from 1
CronLine = namedtuple('CronLine', 'when command line')

# A field of a time: its name, from and to which number it goes, the names of these
CronField = namedtuple('CronField', 'name lowest highest names')
MONTHS = 'jan feb mar apr may jun jul aug sep oct nov dec'.split()
WEEKDAYS = 'sun mon tue wed thu fri sat'.split()
CRON_FIELDS = [
    CronField('minute', 0, 59, {}),
    CronField('hour', 0, 23, {}),
    CronField('day of the month', 1, 31, {}),
    CronField('month', 1, 12, dict(zip(MONTHS, range(1, 13)))),
    CronField('weekday', 0, 7, dict(zip(WEEKDAYS, range(7))))]
CRON_WORDS = ('@hourly', '@daily', '@midnight', '@weekly', '@monthly', '@yearly',
              '@annually')

# What to do instead of a line NAME=VALUE; the names are cron's own.
CRON_VARIABLES = {
    'CRON_TZ': 'the times are by the clock of the server',
    'MAILTO': "leave it out: what a line prints goes to the system's log",
    'SHELL': 'leave it out: a command that wants a shell gets sh'}

def parse_crontab(text):
    """[CronLine] of a pushed crontab. cron leaves out the whole file for one line that it
    cannot read: Failure for that line."""
    lines = []
    for number, written in enumerate(text.split('\n'), 1):
        line = written.strip(' \t\r')
        if not line or line.startswith('#'):
            continue

        try:
            found = parse_cron_line(line, number)
            check_is_other(found, lines)
        except Failure as problem:
            raise Failure('crontab:%d: %s', number, problem)
        lines.append(found)
    return lines

def parse_cron_line(text, number):
    """The CronLine of a line that is no comment, or Failure."""
    check_cron_text(text)
    count = 1 if text.startswith('@') else len(CRON_FIELDS)
    words = re.split('[ \t]+', text, maxsplit=count)
    if count == 1:
        check_cron_word(words[0])
    else:
        for field, word in zip(CRON_FIELDS, words):
            check_cron_field(field, word)
    rest = ''.join(words[count:])
    refuse_if(not rest.strip(), 'five times and a command are wanted, as `0 4 * * * '
              'bin/report`, or @daily and a command')

    refuse_if(re.match('root[ \t]', rest), '`root`: leave the user out, the command '
              'runs as the image says (or rename the file, where it is not for dockhand)')
    return CronLine(' '.join(words[:count]), unescaped_percents(rest), number)

def check_cron_text(text):
    """Failure for what no line may hold, or cannot be a line with a time."""
    refuse_if(len(text) > CRON_LETTERS, 'longer than %d characters: put that in a script '
              'of the image', CRON_LETTERS)
    refuse_if(u'\ufffd' in to_bytes(text).decode('utf-8', 'replace'),
              'its letters are not those of UTF-8')
    refuse_if(re.search(r'[\0-\x08\x0a-\x1f\x7f]', text), 'it holds a control character')

    name, equals, _ = text.partition('=')
    name = name.rstrip()
    if equals and re.match(r'[A-Za-z_]\w*\Z', name):
        name = printable(name)
        remedy = 'variables are config: sudo dockhand config APP %s=VALUE' % name
        raise Failure('`%s=`: %s', name, CRON_VARIABLES.get(name, remedy))

def check_cron_word(word):
    """Failure unless a word beginning with @ is one of those that stand for a time."""
    refuse_if(word == '@reboot', '`@reboot`: a process that runs always is a line of the '
              'Procfile, or the CMD of the Dockerfile')
    refuse_if(word not in CRON_WORDS, '`%s`: no such time; there are %s', printable(word),
              ' '.join(CRON_WORDS))

def check_cron_field(field, word):
    """Failure unless every cron reads this field of a time, a list of parts."""
    for part in word.split(','):
        if not is_cron_part(field, part):
            raise Failure('%s `%s`: `*`, numbers from %d to %d, and of these ranges, '
                          'lists and steps are wanted, as 1-5, 1,3 or */2', field.name,
                          printable(word), field.lowest, field.highest)

def is_cron_part(field, part):
    """Whether a part of a field is `*`, a number or a range, and may have a step."""
    span, slash, pace = part.partition('/')
    first, dash, last = span.partition('-')
    if slash and not (dash or span == '*'):
        return False
    if slash and not is_cron_step(field, pace):
        return False
    if span == '*':
        return True

    low = cron_number(field, first)
    high = cron_number(field, last) if dash else low
    return low is not None and high is not None and low <= high

def is_cron_step(field, text):
    is_number = re.match('[1-9][0-9]?\\Z', text) is not None
    return is_number and int(text) <= field.highest

def cron_number(field, text):
    """The number that a word means in a field, None where it means none."""
    if text.lower() in field.names:
        return field.names[text.lower()]
    if not re.match(r'[0-9]{1,2}\Z', text):
        return None
    number = int(text)
    return number if field.lowest <= number <= field.highest else None

def unescaped_percents(command):
    """A command without cron's quoting of `%`; Failure for a bare one, which in a crontab
    ends the command and begins what it reads."""
    refuse_if('%' in command.replace('\\%', ''), 'a bare `%` ends the command in a '
              'crontab: write `\\%`')
    return command.replace('\\%', '%')

def check_is_other(line, lines):
    """Failure where a line stands there already, or is one too many."""
    refuse_if(len(lines) == CRON_LINES, 'more than %d lines', CRON_LINES)
    for earlier in lines:
        refuse_if(cron_id(earlier) == cron_id(line), 'the same as line %d', earlier.line)

def cron_id(line):
    """What a line is called from one release to the next: the same as long as it is."""
    import hashlib
    return hashlib.sha1(to_bytes('%s %s' % (line.when, line.command))).hexdigest()[:8]

def cron_lines(release):
    """The [CronLine] of a release, [] where it brings none."""
    return parse_crontab(release.crontab or '')

def cron_path(app):
    """Where cron reads an app's times. It skips a name with a dot; no app's has `--`."""
    return '%s/dockhand-%s' % (CRON_FILES, app.replace('.', '--'))

def cron_script_path(app, number):
    """The sh of a release that cron calls."""
    return '%s/apps/%s/releases/%d/cron' % (STATE, app, number)

def cron_container(release, line):
    """The name of the container in which a line of a release runs."""
    return '%s--cron-%s' % (container_name(release), cron_id(line))

CRON_FILE = """# Times, and for each the id of a line, of whatever release is live then
SHELL=/bin/sh
PATH={path}
"""

def render_cron_file(release):
    """What cron reads of a release: times, and ids of lines. Nothing else that was pushed
    is in it. '' where there is no line."""
    lines = cron_lines(release)
    if not lines:
        return ''

    script = '/bin/sh %s/apps/%s/live/cron' % (STATE, release.app)
    text = CRON_FILE.format(path=ENVIRONMENT['PATH'])
    for line in lines:
        text += '%s root %s %s\n' % (line.when, script, cron_id(line))
    return headed(release.app, 'crontab', text)

# The sh that cron calls. It asks docker too whether the line still runs, in a container
# of any release: a docker client that was killed holds no lock any more.
CRON_SCRIPT = """# dockhand: {app}'s crontab: cron calls this with the id of a line
set -eu
umask 077
[ ! -e {store}/stopped ] || exit 0
dockhand_id=${{1:-}}
case $dockhand_id in
{cases}
*) exit 0 ;;
esac

{exports}tell() {{ logger -t dockhand/{app} "crontab:$dockhand_line: $*"; }}

if [ -e {store}/exporting ]; then
    tell "not started while the app is copied"
    exit 0
fi
mkdir -p {locks}
exec 9>>"{locks}/{app}--$dockhand_id"
if ! flock -n 9; then
    tell "not started, since it still runs"
    exit 0
fi
dockhand_pattern='^/*{pattern}--[0-9]*--cron-'$dockhand_id'$'
if ! dockhand_runs=$(docker ps -q --filter "name=$dockhand_pattern" 2>&1); then
    tell "not started: $dockhand_runs"
    exit 1
fi
if [ -n "$dockhand_runs" ]; then
    tell "not started, since it still runs in container $dockhand_runs"
    exit 0
fi

dockhand_name={container}--cron-$dockhand_id
docker rm "$dockhand_name" >/dev/null 2>&1 || :

# Its exit status goes past the log of what it prints, by descriptor 3
run() {{
    dockhand_status=0
    docker run --rm --name "$dockhand_name" {options} "$@" 2>&1 3>&- || dockhand_status=$?
    echo "$dockhand_status" >&3
}}
dockhand_status=$({{ run "$@" | logger -t dockhand/{app} 9>&- 3>&-; }} 3>&1)
tell "exit status $dockhand_status ({container})"
"""

# Variables by which a shell itself is told something
SHELLS_OWN = '''IFS LINENO MAIL MAILPATH OLDPWD OPTARG OPTIND PATH PPID PS1 PS2 PS4 PWD _
    ENV HOME CDPATH'''.split()

def render_cron_script(release, options, env):
    """The sh that runs a line of a release, by its id. options: of `docker run`, up to
    the image; env: the variables that these name and leave to docker's own environment"""
    options = list(options)
    exports = ''
    for name in sorted(env):
        if re.match(r'(?!dockhand_)\w+\Z', name) and name not in SHELLS_OWN:
            exports += 'export %s=%s\n' % (name, quote(env[name]))
        else:                           # as with a dot, which a shell's have not
            at = options.index('--env=' + name)
            options[at] += '=' + env[name]
    cases = ['%s) dockhand_line=%d; set -- %s ;;' % (
        cron_id(line), line.line, ' '.join(map(quote, command_words(line.command))))
        for line in cron_lines(release)]
    return CRON_SCRIPT.format(
        app=release.app, store='%s/apps/%s' % (STATE, release.app), locks=CRON_LOCKS,
        cases='\n'.join(cases), exports=exports, pattern=release.app.replace('.', '[.]'),
        container=container_name(release), options=' '.join(map(quote, options)))

# ---- Proxy files read as nginx reads them (pure functions) -----------------------------
# From a text to nginx's own tree of directives.

# words: its name and arguments, without their quotes. line: in which it begins, from 1.
# begin, end: where in the text it stands, its `;` or `}` included. inside: [Directive] of
# its block, None where it ends with `;`. opened: where in the text that block begins.
Directive = namedtuple('Directive', 'words line begin end inside opened')

# What stands at one place of an nginx file, behind blanks. A bare word goes on over
# quotes, `#`, `}` and what a backslash precedes; `{` ends it, but not right after `$`.
NGINX_TOKEN = r'''(?xs)(?P<blanks>[ \t\r\n]*)(?:
    (?P<comment>\#[^\n]*)
  | (?P<mark>[;{}])
  | (?P<quoted>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
  | (?P<bare>(?:\\.|\$\{*|[^ \t\r\n;{}\#"'\\$])(?:\\.|\$\{*|[^ \t\r\n;{\\$])*)
  | \Z)'''

NGINX_ESCAPES = {'t': '\t', 'r': '\r', 'n': '\n', '"': '"', "'": "'", '\\': '\\'}
CONTROL = r'[\0-\x08\x0b\x0c\x0e-\x1f\x7f]'
# Files of the distribution, which hold parameters, and what php wants
INCLUDES = ('fastcgi_params', 'proxy_params', 'scgi_params', 'uwsgi_params',
            'fastcgi.conf', 'snippets/fastcgi-php.conf', 'mime.types')
DEEPEST = 20                    # blocks in one another
DATA_BLOCKS = ('charset_map', 'geo', 'map', 'split_clients', 'types')

class NginxReader(object):
    """Reads a file as nginx's ngx_conf_read_token does, in one pass.

    Blanks are space, tab, CR and LF alone. A word begins after a blank or a mark. Only
    there do quotes quote, does `#` begin a comment, and does `}` end a block: inside a
    bare word they are letters, as a backslash makes of anything. After a closing quote
    nothing may follow but a blank, `;`, `{` or `)`.

    directives: [Directive] as far as the file can be read; troubles: [(line, what nginx
    will refuse, or may read in another way than this)].
    """
    def __init__(self, text):
        self.text = text
        self.troubles = []
        self.directives = []
        self.around = []        # of each open block: (it so far, list it is in)
        self.into = self.directives
        self.words = []         # of the directive that is being read
        self.line = 1           # in which it begins
        self.begin = 0          # where in the text it begins
        self.read()

    def read(self):
        """Take one token after the other, until the end or something that is none."""
        self.note_control_characters()
        text = self.text
        token = re.compile(NGINX_TOKEN)
        at = 0
        line = 1
        after_quote = False

        while at < len(text):
            match = token.match(text, at)
            if match is None:
                line += re.match('[ \t\r\n]*', text[at:]).group().count('\n')
                return self.stop(line, 'a quote or a word that does not end')
            # (take_mark refuses the `}`.)
            if after_quote and text[at] not in ' \t\r\n;{)}':
                return self.stop(line, 'something directly behind a closing quote')

            kind = match.lastgroup
            line += text.count('\n', at, match.start(kind))
            if kind in ('quoted', 'bare'):
                self.take_word(match, kind, line)
            elif kind == 'mark' and not self.take_mark(match, line):
                return
            after_quote = kind == 'quoted'
            at = match.end()
            line += text.count('\n', match.start(kind), at)

        if self.words:
            self.stop(line, 'a directive without `;`')
        elif self.around:
            self.stop(line, 'a block without `}`')

    def note_control_characters(self):
        match = re.search(CONTROL, self.text)
        if match:
            self.trouble(line_at(match), 'a control character')

    def take_word(self, match, kind, line):
        if not self.words:
            self.line = line
            self.begin = match.start(kind)

        word = match.group(kind)
        if kind == 'quoted':
            word = word[1:-1]
        elif has_brace(word):
            self.trouble(line, '`%s`: put what holds `{` or `}` into quotes'
                         % printable(word))
        self.words.append(without_escapes(word))

    def take_mark(self, match, line):
        """End a directive, begin or end a block; False where nginx gives up."""
        mark = match.group('mark')
        ends_block = mark == '}'
        is_in_place = not self.words if ends_block else bool(self.words)
        if not is_in_place or (ends_block and not self.around):
            self.stop(line, '`%s` where nginx wants none' % mark)
            return False
        if mark == '{' and len(self.around) == DEEPEST:
            self.stop(line, 'more than %d blocks in one another' % DEEPEST)
            return False

        if mark == ';':
            self.add(Directive(self.words, self.line, self.begin, match.end(), None,
                               None))
        elif mark == '{':
            block = Directive(self.words, self.line, self.begin, None, None, match.end())
            self.around.append((block, self.into))
            self.into = []
        else:
            self.close(match.end())
        self.words = []
        return True

    def close(self, end):
        """End the innermost block."""
        inside = self.into
        block, self.into = self.around.pop()
        self.add(block._replace(end=end, inside=inside))

    def add(self, directive):
        self.into.append(directive)
        name = directive.words[0]
        arguments = directive.words[1:]
        if name == 'include' and not is_known_include(arguments):
            self.trouble(directive.line, '`include`: it is not read here: copy its lines')
        elif name.endswith('_by_lua_block'):
            self.trouble(directive.line, '`%s`: it is not read here' % printable(name))

    def trouble(self, line, text):
        self.troubles.append((line, text))

    def stop(self, line, text):
        """Nginx reads no further; what is open ends here."""
        self.trouble(line, text)
        while self.around:
            self.close(len(self.text))

def has_brace(word):
    """Whether a bare word has a `{` or `}`, but for those of `${name}`."""
    if '{' not in word and '}' not in word:
        return False
    without_variables = re.sub(r'\$\{\w+\}', '', word)
    return '{' in without_variables or '}' in without_variables

def without_escapes(word):
    """A word with the characters that its backslashes stand for."""
    if '\\' not in word:
        return word
    return re.sub(r'''\\([trn"'\\])''',
                  lambda match: NGINX_ESCAPES[match.group(1)], word)

def is_known_include(arguments):
    """Whether an `include` names one of those files of the distribution."""
    names = [name.replace('/etc/nginx/', '', 1) for name in arguments]
    return len(names) == 1 and names[0] in INCLUDES

def all_directives(directives):
    """Every Directive, also inside blocks, but for the lines of tables like `map`."""
    for directive in directives:
        yield directive
        if directive.inside and directive.words[0] not in DATA_BLOCKS:
            for inner in all_directives(directive.inside):
                yield inner

def flat(directive):
    """A directive's words and those inside it, to compare blocks word for word."""
    inside = [flat(inner) for inner in directive.inside or ()]
    return directive.words, inside

# ---- Proxy files: what one app's may say beside the others' (pure functions) -----------
# Rules for what `nginx -t` takes, although it reaches past the app: one app's file must
# not change another's by accident. It is no jail: root and alias may serve whatever nginx
# itself may read, and proxy_pass may reach any port of this machine. Uses the reader.

# place: FILE:LINE; listens: [Listen]; names: in lower case, '' where there is none;
# block: its Directive
Server = namedtuple('Server', 'place listens names block')
# words: what else it says of its socket, as `ssl` or `backlog=9`
Listen = namedtuple('Listen', 'address port default words place')
ALL = ('*', '[::]')             # the addresses of a Listen that mean every address

def servers_of(text, path='nginx-proxy.conf'):
    """The server blocks of a file in conf.d, as [Server], as far as they can be read."""
    return servers_in(NginxReader(text).directives, path)

def servers_in(directives, path):
    """The [Server] among the directives of a file."""
    return [read_server(block, path) for block in server_blocks(directives)]

def server_blocks(directives):
    """The `server` blocks among some directives, as [Directive]."""
    return [directive for directive in directives
            if directive.words == ['server'] and directive.inside is not None]

def read_server(block, path):
    """The Server of a `server` block."""
    listens = []
    names = []
    for directive in block.inside:
        name = directive.words[0]
        arguments = directive.words[1:]
        place = '%s:%d' % (path, directive.line)
        if name == 'listen' and arguments:
            listens.append(read_listen(arguments, place))
        elif name == 'server_name':
            names.extend(read_server_names(arguments))

    place = '%s:%d' % (path, block.line)
    if not listens:
        listens.append(Listen('*', '80', False, (), place))
    return Server(place, listens, names or [''], block)

def read_listen(arguments, place):
    """The Listen of `listen [ADDRESS:]PORT|ADDRESS|unix:PATH WORD...`."""
    address, port = split_address(arguments[0])
    words = arguments[1:]
    default = any(word in DEFAULT for word in words)
    socket_words = sorted(word for word in words if word not in NO_SOCKET_WORDS)
    return Listen(address, port, default, tuple(socket_words), place)

def split_address(where):
    """(address, port) of what a `listen` names: `*` stands for every IPv4 address, and a
    file has no port. An IPv6 address is in brackets; ports may begin with zeros. (What
    has more digits is no port for nginx either.)"""
    if where.startswith('unix:'):
        return where, ''
    match = re.match(r'(?:(\[[^]]*\]|[^:\[\]]+):)?0*(\d{1,9})\Z', where)
    if match:
        address = match.group(1) or '*'
        port = str(int(match.group(2)))
    else:
        address = where
        port = '80'

    if address == '0.0.0.0':
        address = '*'
    return address, port

DEFAULT = ('default_server', 'default')
NO_SOCKET_WORDS = DEFAULT + ('ipv6only=on',)            # which is the rule anyway

def read_server_names(arguments):
    """The names of a `server_name`; `.x` means x and *.x. Expressions keep their case."""
    names = []
    for word in arguments:
        if word.startswith('~'):
            names.append(word)
        elif word.startswith('.'):
            names.append(word[1:].lower())
            names.append('*' + word.lower())
        else:
            names.append(word.lower())
    return names

def proxied_ports(text):
    """The ports on this machine that a proxy file passes requests to."""
    return set(re.findall(r'(?:127\.0\.0\.1|localhost|0\.0\.0\.0):(\d+)', text or ''))

def proxy_path(app):
    return PROXIES + '/%s.conf' % app

def app_of_file(path):
    """The app whose proxy file has this path, or None."""
    match = re.match(re.escape(PROXIES) + r'/([^/]+)\.conf\Z', path)
    if match is None:
        return None
    return match.group(1)

def owner_text(path, known):
    """Whose a file is. known: the apps that the person may know of, None for all"""
    app = app_of_file(path)
    if known is None or app in known:
        return app or path
    return 'something else here'

# What may stand beside `server`: the rest would hold for every other app. Each has a name
# that all files share: at this position, or behind the beginning of a word.
SHARED_NAMES = {'upstream': 1, 'log_format': 1, 'map': 2, 'split_clients': 2, 'geo': -1,
                'limit_req_zone': 'zone=', 'limit_conn_zone': 'zone=',
                'proxy_cache_path': 'keys_zone=', 'fastcgi_cache_path': 'keys_zone=',
                'scgi_cache_path': 'keys_zone=', 'uwsgi_cache_path': 'keys_zone='}
TABLES = ('map', 'geo', 'split_clients')        # the same one may stand in several files

SharedName = namedtuple('SharedName', 'kind name directive path')

def shared_names(directives, path):
    """[SharedName] of what a file defines for all files. kind: variable, zone, upstream
    or log_format; nginx compares variables in lower case"""
    found = []
    for directive in directives:
        keyword = directive.words[0]
        words = directive.words
        where = SHARED_NAMES.get(keyword)
        if where is None or len(words) < 2:
            continue

        if keyword in TABLES:
            kind = 'variable'
            names = [word.lower() for word in words[where:][:1]]
        elif isinstance(where, str):
            kind = 'zone'
            names = [word[len(where):].partition(':')[0] for word in words
                     if word.startswith(where)]
        else:
            kind = keyword
            names = words[where:][:1]

        found.extend(SharedName(kind, name, directive, path) for name in names)
    return found

# Variables that nginx makes itself and would let a file make anew, for every app.
OWN_VARIABLES = r'''(?xi)
    (http | sent_http | sent_trailer | upstream | arg | cookie | ssl | uid | geoip
        | realip | connections | jwt | proxy_internal | proxy_protocol | session_log)_
    | (args | limit_rate | limit_req_status | limit_conn_status | proxy_host | proxy_port
        | proxy_add_x_forwarded_for | fastcgi_script_name | fastcgi_path_info
        | gzip_ratio | memcached_key | secure_link | secure_link_expires | slice_range
        | invalid_referer | date_local | date_gmt | modern_browser | ancient_browser
        | msie | http2 | http3 | spdy | spdy_request_priority
        | dockhand_(token | plain | none))\Z'''
CAPTURE = r"""\(\?P?[<']([A-Za-z_]\w*)[>']"""

def captured_variables(directives):
    """[(variable, Directive)] of the named groups in the expressions of a file: nginx
    knows one variable of a name, whichever file it is from."""
    captured = []
    for directive in all_directives(directives):
        for word in table_words(directive):
            for name in re.findall(CAPTURE, word):
                captured.append(('$' + name.lower(), directive))
    return captured

def table_words(directive):
    """A directive's words, with those of its lines where it is a table like `map`."""
    words = list(directive.words)
    if directive.words[0] in DATA_BLOCKS:
        for line in directive.inside or ():
            words.extend(line.words)
    return words

# Which directives may name a file, and whose words begin with `/` for other reasons.
FILE_DIRECTIVES = r'''root | alias | auth_basic_user_file | ssl_dhparam
    | (\w+_)?ssl_((client|trusted)_)?certificate(_key)? | ssl_crl'''
PATH_DIRECTIVES = set('''add_after_body add_before_body add_header add_trailer auth_basic
    auth_request default_type error_page expires fastcgi_cache_key fastcgi_index
    fastcgi_param fastcgi_pass fastcgi_split_path_info geo grpc_pass grpc_set_header
    health_check http2_push if include index location
    log_format map memcached_pass mirror post_action proxy_cache_key proxy_cookie_path
    proxy_pass proxy_redirect proxy_set_body proxy_set_header return rewrite scgi_param
    scgi_pass secure_link secure_link_md5 server set split_clients sub_filter try_files
    types userid_path uwsgi_param uwsgi_pass valid_referers'''.split())
# These name a file, without a `/` at its beginning too.
OTHER_FILES = r'''\w*_(temp_path|file|store) | \w*(ticket_key|_crl) | load_module
    | js_(import|include|path) | perl\w* | xslt_\w+ | xml_\w+ | geoip\w* | lua_\w+
    | pid | lock_file'''

def file_problem(app, directive):
    """What is wrong with the files that a directive names, or None. nginx opens, and may
    make, each of them as root when the configuration is tested."""
    name = directive.words[0]
    arguments = directive.words[1:]
    if name in ('access_log', 'error_log'):
        return log_problem(app, name, arguments)
    if name.endswith('_cache_path'):
        return cache_problem(app, arguments)
    if re.match('(?x)(?:%s)\\Z' % FILE_DIRECTIVES, name):
        return path_problem(arguments)
    if name.endswith('_store') and arguments in (['on'], ['off']):
        return None

    names_a_file = re.match('(?x)(?:%s)\\Z' % OTHER_FILES, name)
    has_path = any(re.match(r'(\w+=)?/', word) for word in arguments)
    if names_a_file or (has_path and name not in PATH_DIRECTIVES):
        return ('a proxy file may name files with root, alias, auth_basic_user_file, '
                'ssl_certificate and logs alone')
    return None

def path_problem(arguments):
    """What is wrong with the path of a file that may be named, or None. OpenSSL loads a
    library for `engine:...`; to read what is no file may never end."""
    for word in arguments:
        if '..' in word.split('/'):
            return 'write the path without `..`'

        if ':' in word and not word.startswith('data:'):
            return 'write the path of a file'
        if re.match('/+(dev|proc|sys)(/|\\Z)', os.path.normpath(word)):
            return 'this is no place for files'
    return None

def log_problem(app, name, arguments):
    """Where the logs of an app may be: in nginx's folder, under the app's name."""
    where = arguments[0] if arguments else ''
    if name == 'access_log' and where == 'off':
        return None
    if where.startswith('syslog:') and 'unix:' not in where.lower():
        return None

    # An app may be called access or error: nginx's own logs have these names.
    is_nginxs = where in (NGINX_LOGS + '/access.log', NGINX_LOGS + '/error.log')
    own = r'%s/%s(-[A-Za-z0-9][A-Za-z0-9._-]*)?\.log\Z' % (NGINX_LOGS, re.escape(app))
    if re.match(own, where) and not is_nginxs:
        return None
    return 'its place is %s/%s.log, or %s-NAME.log' % (NGINX_LOGS, app, app)

def cache_problem(app, arguments):
    """Where the cache of an app may be: in a folder with the app's name."""
    folder = '/var/cache/nginx/' + app
    where = arguments[0] if arguments else ''
    is_below = (where + '/').startswith(folder + '/')
    if is_below and '$' not in where and '..' not in where.split('/'):
        return None
    return 'its place is %s, or below it' % folder

def files_made(directives):
    """The logs and caches that a file names: nginx makes them where they are missing."""
    paths = []
    for directive in all_directives(directives):
        name = directive.words[0]
        arguments = directive.words[1:]
        makes_files = name.endswith(('access_log', 'error_log', '_cache_path'))
        if makes_files and arguments and arguments[0].startswith('/'):
            paths.append(arguments[0])
    return paths

def rule_problems(app, directives, others, version, known=None):
    """What a pushed file says that would reach other apps, or the server, past its own
    `server` blocks: [(Directive, text)]. `nginx -t` takes all of it.
    others: [(path, [Directive])] of the server's other files; version: nginx's; known:
    as owner_text wants it"""
    found = list(size_problems(directives))
    if found:
        return found                # to hold so much against all others takes too long

    for directive in directives:
        if directive.words != ['server'] and directive.words[0] not in SHARED_NAMES:
            found.append((directive, 'outside of `server { }` it holds for every app: '
                          'write it inside'))

    for directive in all_directives(directives):
        problem = file_problem(app, directive) or word_problem(directive)
        if problem:
            found.append((directive, problem))
    found.extend(name_problems(directives, others, known))
    found.extend(listen_problems(app, directives, others, version))
    return found

# In one file
MOST_NAMES = 200
MOST_LISTENS = 50
MOST_SHARED = 100

def size_problems(directives):
    """Where a file says more than any person writes, as rule_problems gives it."""
    limits = {'server_name': MOST_NAMES, 'listen': MOST_LISTENS, 'shared': MOST_SHARED}
    counted = dict.fromkeys(limits, 0)
    for directive in all_directives(directives):
        kind = directive.words[0]
        if kind in SHARED_NAMES:
            kind = 'shared'
        if kind not in counted:
            continue

        if kind == 'server_name':
            counted[kind] += len(directive.words) - 1
        else:
            counted[kind] += 1
        if counted[kind] > limits[kind]:
            yield directive, 'more than %d of these in a file' % limits[kind]
            return

# What nginx takes from the default server of a port for every server on that port; what
# our own files say of it is more than nginx's own, and takes nothing from another
OF_A_PORT = '''client_header_buffer_size client_header_timeout ignore_invalid_headers
    large_client_header_buffers underscores_in_headers'''.split()
LARGE_HEADERS = ['large_client_header_buffers', '4', '32k']

def word_problem(directive):
    """What is wrong with the words of a directive, wherever it stands, or None."""
    name = directive.words[0]
    arguments = directive.words[1:]
    if name == 'ssl' and [word.lower() for word in arguments] != ['off']:
        return 'write `listen 443 ssl;`'
    if name == 'listen' and arguments:
        return address_problem(arguments[0])
    if name == 'server_name':
        plain = [word for word in arguments if not word.startswith('~')]
        if '$' in ''.join(plain):
            return 'write the name itself'

    if name in ('proxy_cache', 'fastcgi_cache', 'scgi_cache', 'uwsgi_cache'):
        if '$' in ''.join(arguments):
            return 'write the name of the cache itself'
    if directive.words == ['server']:
        return default_problem(directive)
    return None

def address_problem(address):
    """What is wrong with where a `listen` listens, or None."""
    if address.lower().startswith('unix:'):
        return 'listen on a port instead of a file'
    if re.search(r'\d-\d+\Z', address):
        return 'write each port by itself'
    return None

def default_problem(block):
    """What a `server` block says for all servers of its port, if it is their default
    one, or None."""
    inside = [directive.words for directive in block.inside or ()]
    listens = [words for words in inside if words[0] == 'listen']
    is_default = any(word in DEFAULT for words in listens for word in words)
    for words in inside:
        if is_default and words[0] in OF_A_PORT and words != LARGE_HEADERS:
            return '`%s` in a default_server holds for all on its port' % words[0]
    return None

def name_problems(directives, others, known):
    """What a file defines that another one, or nginx itself, has under the same name: as
    rule_problems gives it."""
    theirs = {}                 # (kind, name): [SharedName] of other files
    used = set()                # the names that they capture, set or pass requests to
    for path, other in others:
        for shared in shared_names(other, path):
            theirs.setdefault((shared.kind, shared.name), []).append(shared)
        used.update(name for name, _ in captured_variables(other))
        used.update(names_used(other))

    found = []
    for shared in shared_names(directives, ''):
        problem = shared_name_problem(shared, theirs, used, known)
        if problem:
            found.append((shared.directive, problem))
    for name, directive in captured_variables(directives):
        if is_nginxs_variable(name) or ('variable', name) in theirs:
            found.append((directive, 'it captures %s, which others use: choose another '
                          'name' % name))
    return found

def names_used(directives):
    """What a file sets or asks by a name that a table or an upstream of another file
    would take: its variables, and the hosts that it passes requests to."""
    for directive in all_directives(directives):
        name = directive.words[0]
        arguments = directive.words[1:]
        if name in ('set', 'auth_request_set') and arguments:
            yield arguments[0].lower()
        elif name.endswith('_pass') and arguments:
            yield host_passed_to(arguments[0])

def host_passed_to(address):
    """The host of `http://HOST:PORT/PATH`, or of what is written shorter."""
    return re.split('[:/]', address.rpartition('://')[2])[0]

def shared_name_problem(shared, theirs, used, known):
    """What is wrong with a SharedName, or None. theirs: {(kind, name): [SharedName]};
    used: what other files capture, set, or pass requests to"""
    is_variable = shared.kind == 'variable'
    for other in theirs.get((shared.kind, shared.name), []):
        if not is_variable or flat(other.directive) != flat(shared.directive):
            return '%s has a %s of this name: choose another' % (
                owner_text(other.path, known), shared.kind)

    if is_variable and is_nginxs_variable(shared.name):
        return 'this is a variable of nginx, for every app: choose another name'
    if is_variable and shared.name in used:
        return 'another file sets a variable of this name: choose another'
    if shared.kind == 'upstream' and shared.name in used:
        return 'another file passes requests to a host of this name: choose another'
    return None

def is_nginxs_variable(name):
    return bool(re.match(OWN_VARIABLES, name.lstrip('$')))

def listen_problems(app, directives, others, version):
    """What a `listen` says of a socket that other servers share, and they do not: as
    rule_problems gives it."""
    theirs = {'80': [set()], '443': [set(['ssl'])]}     # of 000-dockhand.conf
    for path, other in others:
        for server in servers_in(other, path):
            for listen in server.listens:
                theirs.setdefault(listen.port, []).append(set(listen.words))

    found = []
    for directive in listen_directives(directives):
        listen = read_listen(directive.words[1:], '')
        word = first_difference(listen, theirs.get(listen.port, []), version)
        if word:
            found.append((directive, '`%s` would hold for all on port %s, or theirs for '
                          'this: leave it as they have it, or take another port'
                          % (word, listen.port)))

        if becomes_default(app, listen, others):
            found.append((directive, 'another file has port %s, and would lose the '
                          'requests for unknown names: take another port' % listen.port))
    return found

def first_difference(listen, theirs, version):
    """A word of a Listen, or of the first `listen` that differs from it, or None.
    theirs: [set of words] of those that have the same port"""
    for words in theirs:
        word = socket_difference(set(listen.words), words, version)
        if word:
            return word
    return None

def becomes_default(app, listen, others):
    """Whether a Listen takes the requests for unknown names on a port from another file:
    the first server of a port has them, if none says default_server. On 80 and 443 that
    is ours of 000-dockhand.conf."""
    if listen.port in ('80', '443'):
        return False

    paths = []                          # of the files that have this port
    for path, directives in others:
        for server in servers_in(directives, path):
            there = [other for other in server.listens if other.port == listen.port]
            if any(other.default for other in there):
                return False
            if there:
                paths.append(path)
    if not paths:
        return False

    own = proxy_path(app)
    return listen.default or own < min(paths)

def listen_directives(directives):
    """Every `listen` Directive of the servers of a file."""
    listens = []
    for block in server_blocks(directives):
        for directive in block.inside:
            if directive.words[0] == 'listen' and len(directive.words) > 1:
                listens.append(directive)
    return listens

def socket_difference(ours, theirs, version):
    """A word of two `listen` of one port that both must have, or neither, or None. With
    TLS a client says whether it speaks HTTP/2; without, nginx can tell from 1.25.1 on."""
    differing = ours ^ theirs
    if version >= (1, 25, 1) or 'ssl' in ours & theirs:
        differing = differing - set(['http2'])
    return min(differing) if differing else None

# ---- Host names, as nginx ranks them (pure functions) ----------------------------------
# Whether one `server_name` would get the requests of another. Uses the section above to
# say whose a file is.

# A server_name, whose it is (a path), and on which port. 80 and 443 count as one.
Claim = namedtuple('Claim', 'name path port place')

def claims_of(servers, path):
    """[Claim] of each name on each port of some servers."""
    claims = []
    for server in servers:
        for listen in server.listens:
            port = '80' if listen.port == '443' else listen.port
            claims.extend(Claim(name, path, port, server.place) for name in server.names)
    return claims

def rank_of(name):
    """nginx asks exact names first, then `*.x`, then `x.*`, then expressions."""
    if name.startswith('~'):
        return 3
    if name.endswith('.*'):
        return 2
    if name.startswith('*.'):
        return 1
    return 0

def takes_from(name, other):
    """Whether a server_name would get requests that another server's has now."""
    if other in ('', '_') or name in ('', '_'):
        return False

    rank = rank_of(name)
    others_rank = rank_of(other)    # nginx asks the lower rank first
    # An expression is asked last, but may listen where the other does not: it is refused
    # if it matches at all. (Of two expressions the first has a request: see robs.)
    if rank == 3:
        return others_rank < 3 and expression_matches(name, other.replace('*', 'x'))
    if rank > others_rank or rank == others_rank == 0:
        return False
    if others_rank == 3:
        return may_match(other, name)
    if rank == 0:
        return is_covered(name, other)

    # Of two wildcards of one kind the longer one has a request.
    if rank == others_rank == 1:
        return name != other and name.endswith(other[1:])
    if rank == others_rank == 2:
        return name != other and name.startswith(other[:-1])
    return True                     # some host is below x and begins with y: *.x has it

def is_covered(name, wildcard):
    """Whether an exact name is one of those that `*.x` or `x.*` stands for."""
    if wildcard.startswith('*.'):
        return name.endswith(wildcard[1:])
    return name.startswith(wildcard[:-1])

# What makes an expression one that is not tried: it may take for ever, or Python reads it
# in another way than nginx's PCRE.
NOT_TRIED = r'\)[*+?{]|\[\[:|\\[^.dDwWsSbB$^*+?(){}|\[\]-]|\(\?(?!P?<[A-Za-z_]|:)'

LONGEST_EXPRESSION = 255

def expression_matches(expression, name):
    """Whether a `~expression` matches a name; True where that is not tried."""
    repeated = len(re.findall('[*+{]', expression))
    if len(expression) > LONGEST_EXPRESSION or repeated > 3:
        return True
    if re.search(NOT_TRIED, expression):
        return True
    pattern = re.sub(r'\(\?<(?=[A-Za-z_])', '(?P<', expression[1:])
    try:
        return bool(re.search(pattern, name, re.I))
    except (re.error, RuntimeError, OverflowError):
        return True

def plain_ends(expression):
    """(text that a matching host begins with, text that it ends with) of a `~expression`,
    in lower case; '' where it does not say, or is longer than any that is tried."""
    text = expression.lower()
    if '|' in text or len(text) > LONGEST_EXPRESSION:
        return '', ''

    # A letter with `?`, `*` or `{` behind it may be missing.
    begins = ''
    match = re.match(r'~\^((?:[a-z0-9-]|\\\.)*(?![?*{]))', text)
    if match:
        begins = match.group(1).replace('\\', '')

    ends = ''
    match = re.search(r'((?:[a-z0-9-]|\\\.)*)\$\Z', text)
    if match:
        ends = match.group(1)
        if text[:match.start()].endswith('\\'):     # it begins within \d, or \x41
            ends = re.sub(r'^[a-z0-9]+', '', ends)
        ends = ends.replace('\\', '')
    return begins, ends

def may_match(expression, name):
    """Whether a `~expression` may match a host that a name stands for. Of a wildcard, it
    may unless the plain text at the beginning or end of the expression differs."""
    if rank_of(name) == 0:
        return expression_matches(expression, name)

    begins, ends = plain_ends(expression)
    if name.endswith('.*'):
        begin = name[:-1]
        return begins.startswith(begin) or begin.startswith(begins)
    end = name[1:]
    return ends.endswith(end) or end.endswith(ends)

def may_both_match(expression, other):
    """Whether two expressions may match one host: not where they end in another text."""
    _, end = plain_ends(expression)
    _, other_end = plain_ends(other)
    return end.endswith(other_end) or other_end.endswith(end)

def taken_name(claims, others, known, may_take=()):
    """What is wrong with the first of these names that takes requests from what is there,
    as `FILE:LINE: ...`, or None.
    claims, others: [Claim]; known: as owner_text wants it; may_take: full names that may
    leave a wildcard"""
    there = set((other.name, other.port) for other in others)
    losers = dict(((other.name, other.port, app_of_file(other.path)), other)
                  for other in others)
    wide = [other for other in losers.values() if rank_of(other.name) > 0]

    for claim in claims:
        if (claim.name, claim.port) in there:
            continue                        # the same name: server_claims tells
        rivals = wide
        if rank_of(claim.name) == 3:        # it may match a full name
            rivals = losers.values()
        for other in sorted(rivals):
            if claim.port == other.port and robs(claim, other, may_take):
                return robbed_text(claim, other, known)
    return None

def robs(claim, other, may_take):
    """Whether a Claim takes requests from another one, and may not."""
    ours = rank_of(claim.name)
    theirs = rank_of(other.name)
    if claim.name in may_take and ours == 0 and theirs in (1, 2):
        return False
    if ours == theirs == 3:                 # of two expressions the first has a request
        return claim.path < other.path and may_both_match(claim.name, other.name)
    return takes_from(claim.name, other.name)

def robbed_text(claim, other, known):
    """What to say of a Claim that takes requests from another one."""
    name = printable(claim.name)
    app = app_of_file(other.path)
    if known is not None and app not in known:
        return '%s: the host name "%s" is taken on this server' % (claim.place, name)

    remedy = 'give that full names of its own first'
    if app:
        remedy += ': dockhand config %s domains="..."' % app
    return '%s: "%s" would take requests from %s, which has "%s": %s' % (
        claim.place, name, owner_text(other.path, known), printable(other.name), remedy)

# ---- Proxy files: https (pure functions) -----------------------------------------------
# What nginx gets for an app with https besides its proxy file: where a certificate
# authority looks, a way from http to https, and of each server a twin that listens with
# TLS. It stands between two marks; what lies outside them is the file as it was pushed or
# made. Uses the reader and what a file may say beside others.

# path: of a file with the chain and its key; names: that it is good for, in lower case,
# where `*.x` stands for one label before `.x`
Certificate = namedtuple('Certificate', 'path names')

HTTPS_BEGIN = '# dockhand: https, from here\n'
HTTPS_END = '# dockhand: https, to here\n'

# A challenge comes first: a `return` that the server says itself would answer before any
# location, and the server may want a password.
PASS_CHALLENGES = 'if ($uri ~ "^/\\.well-known/acme-challenge/") { break; }\n'
CHALLENGE_LOCATION = '''location ^~ %s {
    root %s;
    auth_basic off; allow all; default_type text/plain;
%%s}
''' % (CHALLENGE_PATH, CHALLENGES)

# Not for whom a proxy in front has sent here: it may have been asked by https.
TO_HTTPS = '''if ($dockhand_plain ~* "^\\|({names})/(?!\\.well-known/acme-challenge/)") {{
    return 301 https://$host$request_uri;
}}
'''
SET_PLAIN = 'set $dockhand_plain "$http_x_forwarded_proto|$host$uri";\n'
NAMES_AT_ONCE = 10              # in one expression: nginx takes no word over 4 KB

# Mozilla's intermediate ones that want no DH parameters
CIPHERS = ':'.join('ECDHE-%s-%s' % (key, cipher) for cipher in (
    'AES128-GCM-SHA256', 'AES256-GCM-SHA384', 'CHACHA20-POLY1305')
    for key in ('ECDSA', 'RSA'))

def is_full_name(name):
    """Whether a host name can stand in DNS as it is, and so be certified."""
    labels = name.split('.')
    is_number = labels[-1].isdigit()        # as an address ends
    if len(labels) < 2 or len(name) > 253 or is_number:
        return False
    return all(re.match(r'[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z', label)
               for label in labels)

def is_covered_by(name, certified):
    """Whether a certificate for some names is good for a server_name."""
    parent = name.partition('.')[2]
    is_host_name = re.match(r'(\*\.)?[a-z0-9._-]+\Z', name)
    return bool(is_host_name) and (name in certified or '*.' + parent in certified)

def plain_servers(directives):
    """[(block, Server)] of those that https is made for: they listen on port 80 alone.
    One that listens on 443 itself is left alone, and so is each name that it serves."""
    servers = [(block, read_server(block, '')) for block in server_blocks(directives)]
    secure = [server for _, server in servers if listens_on_443(server)]

    plain = []
    for block, server in servers:
        names = [name for name in server.names
                 if not any(is_served_by(other, name) for other in secure)]
        if names and all(is_plain_web(listen) for listen in server.listens):
            plain.append((block, server._replace(names=names)))
    return plain

def listens_on_443(server):
    return any(listen.port == '443' for listen in server.listens)

def is_served_by(server, name):
    """Whether a Server may get the requests for a server_name where it listens on 443: by
    this name, a wildcard or an expression, or as the default there."""
    if any(listen.port == '443' and listen.default for listen in server.listens):
        return True
    return name in server.names or any(stands_for(other, name) for other in server.names)

def stands_for(other, name):
    """Whether a wildcard or a `~expression` may stand for another server_name."""
    if rank_of(other) == 3:
        return may_match(other, name)
    return rank_of(other) > 0 and is_covered(name, other)

def is_plain_web(listen):
    """Whether a Listen is for http as browsers ask for it."""
    is_plain = not set(listen.words) & set(['ssl', 'proxy_protocol'])
    return listen.address in ALL and listen.port == '80' and is_plain

def plain_names(text):
    """The names of a proxy file that may have https, in their order."""
    names = []
    for _, server in plain_servers(NginxReader(text).directives):
        names += [name for name in server.names if name not in names]
    return names

def names_for_https(text):
    """Those of them that an authority certifies."""
    return [name for name in plain_names(text) if is_full_name(name)]

def uses_of(names, certificates):
    """What each certificate is used for among some names: [(Certificate, [name])]. The
    first that is good for a name has it."""
    uses = []
    left = [name for at, name in enumerate(names) if name not in names[:at]]

    for certificate in certificates:
        covered = [name for name in left if is_covered_by(name, certificate.names)]
        left = [name for name in left if name not in covered]
        if covered:
            uses.append((certificate, covered))
    return uses

def with_https(text, certificates, version):
    """A proxy file as it is installed for an app with https.
    certificates: [Certificate] that are there; version: nginx's, as a tuple"""
    reader = NginxReader(text)
    if reader.troubles:
        return text

    for block, server in reversed(plain_servers(reader.directives)):
        uses = uses_of(server.names, certificates)
        twins = ''.join(render_twin(text, block, server, use, version) for use in uses)
        if twins:
            text = put_lines(text, block.end, twins)
        names = [name for _, covered in uses for name in covered]
        lines = challenge_lines(block) + redirect_lines(names)
        if lines:
            text = put_lines(text, block.opened, indented(lines), '    ')
    return text

def put_lines(text, at, lines, indent=''):
    """A text with lines of ours behind a place in it, between our marks."""
    added = HTTPS_BEGIN + lines + indent + HTTPS_END
    if text[at:at + 1] == '\n':
        at += 1
        added = indent + added
    else:
        added = ' ' + added
    return text[:at] + added + text[at:]

def without_https(text):
    """A text without what with_https has put into it, in one pass whatever it is."""
    pieces = text.split(HTTPS_BEGIN)
    kept = pieces[:1]

    for piece in pieces[1:]:
        _, end, rest = piece.partition(HTTPS_END)
        if end:
            kept[-1] = kept[-1].rstrip(' ')
            kept.append(rest)
        else:
            kept.append(HTTPS_BEGIN + piece)
    return ''.join(kept)

def indented(lines):
    return ''.join('    ' + line for line in lines.splitlines(True))

def challenge_lines(block):
    """What lets challenges through a `server` block, '' where it has a place for them."""
    more = ''
    for directive in block.inside:
        if directive.words[0] == 'location' and 'acme-challenge' in directive.words[-1]:
            return ''
        if directive.words[0] == 'auth_request':
            more = '    auth_request off;\n'
    return PASS_CHALLENGES + CHALLENGE_LOCATION % more

def answers_challenges(text, name):
    """Whether a proxy file has a place of its own for what an authority asks for."""
    return any(name in server.names and not challenge_lines(block)
               for block, server in plain_servers(NginxReader(text).directives))

def redirect_lines(names):
    """What sends those who ask for these names by http to https."""
    lines = ''
    for at in range(0, len(names), NAMES_AT_ONCE):
        some = '|'.join(expression_of(name) for name in names[at:at + NAMES_AT_ONCE])
        lines += TO_HTTPS.format(names=some)
    return lines and SET_PLAIN + lines

def expression_of(name):
    """The expression for the hosts of a server_name that its certificate is good for."""
    return name.replace('.', '\\.').replace('*', '[^./|]+', 1)

# What a twin says in its own way
TWIN_SAYS = ('listen', 'server_name', 'ssl', 'ssl_certificate', 'ssl_certificate_key')

def render_twin(text, block, server, use, version):
    """A server as it listens with TLS for the names of a certificate.
    use: (Certificate, [name])"""
    certificate, names = use
    said = set(directive.words[0] for directive in block.inside)
    lines = tls_listens(server, version) + [
        'server_name ' + ' '.join(names),
        'ssl_certificate ' + certificate.path,
        'ssl_certificate_key ' + certificate.path]
    lines += [line for line in tls_lines(version) if line.split()[0] not in said]

    head = ''.join('    %s;\n' % line for line in lines)
    body = with_server_name(text_inside(text, block, TWIN_SAYS), block, names)
    return 'server {\n' + head + indented(challenge_lines(block)) + body + '}\n'

def with_server_name(body, block, names):
    """A twin's body in which `$server_name` is what it is in its server, that one's first
    name: many send all others there. names: those of the twin"""
    first = read_server(block, '').names[0]
    if first == names[0] or not is_full_name(first):
        return body
    return re.sub(r'\$(server_name\b|\{server_name\})', first, body)

def text_inside(text, block, left_out):
    """What stands in a block, without the directives of some names."""
    parts = []
    at = block.opened
    for directive in block.inside:
        if directive.words[0] not in left_out:
            continue
        part = text[at:directive.begin].rstrip(' \t')
        parts.append(part)

        at = directive.end
        has_line = part.endswith('\n') and text.startswith('\n', at)
        if has_line:                    # of its own, which goes too
            at += 1
    parts.append(text[at:block.end - 1])
    return ''.join(parts).lstrip('\n')

def tls_listens(server, version):
    """How the twin of a Server listens: on IPv6 where that does, and where nginx wants no
    word for it that only one file may say."""
    words = ' ssl'
    if (1, 9, 5) <= version < (1, 25, 1):
        words += ' http2'

    addresses = [listen.address for listen in server.listens]
    lines = []
    if '*' in addresses or version < (1, 3, 4):
        lines.append('listen 443' + words)
    if '[::]' in addresses and version >= (1, 3, 4):
        lines.append('listen [::]:443' + words)
    return lines

def tls_lines(version):
    """What nginx is told of TLS, as [directive without its `;`]."""
    protocols = 'TLSv1.2'
    if version >= (1, 13):
        protocols += ' TLSv1.3'
    lines = ['ssl_protocols ' + protocols,
             'ssl_ciphers ' + CIPHERS,
             'ssl_prefer_server_ciphers off',
             'ssl_session_cache shared:dockhand:10m',
             'ssl_session_timeout 1d']

    if version >= (1, 5, 9):
        lines.append('ssl_session_tickets off')
    if version >= (1, 25, 1):
        lines.append('http2 on')
    return lines

# ---- Proxy files: made, and held against the others' (pure functions) -----------------
# The files that we make ourselves, and each file beside all others. Uses the four
# sections above.

GENERATED = '''{fronts}{format}server {{
    listen 80{default};
    {more}server_name {names};
    {log}server_tokens off;
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

    # What this nginx sees of the client{but_fronts}
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
    proxy_connect_timeout {patience}s; proxy_read_timeout 10m; proxy_send_timeout 10m;
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

# Of a front that config's `trust` names. The last address that it says it had the request
# from is the client; what stands before that, the client may have made up.
BELIEVED = '''\
    if (${trusted}) {{ set $dockhand_way $proxy_add_x_forwarded_for; }}
    if ($dockhand_way ~* "{last_but_one}") {{ set $dockhand_client $1; }}
    set $dockhand_said "${trusted} $http_x_forwarded_proto";
    if ($dockhand_said ~* "^1 http$") {{ set $dockhand_scheme http; }}
    if ($dockhand_said ~* "^1 https$") {{ set $dockhand_scheme https; }}
'''

# The last address but one of a list: some write brackets around it, and its port behind.
LAST_BUT_ONE = (r'(?:^|, ?)\[?([0-9a-f]*:[0-9a-f:.]+|[0-9]+(?:\.[0-9]+){3})\]?'
                r'(?::[0-9]+)?, [^, ]+$')

# How a front's networks are told from all others: nginx's own table
FRONTS = '''geo ${trusted} {{
    default 0;
{lines}}}
'''

# A line of an app's log: nginx's own `combined`, then seconds: in all, and of the app
LOG_FORMAT = '''log_format dockhand_{app} '$dockhand_client - $remote_user [$time_local] '
    '"$request" $status $body_bytes_sent "$http_referer" "$http_user_agent" '
    '$request_time $upstream_response_time';
'''

def render_proxy(app, domains, version, ipv6, trust='', path='', are_machines=False):
    """The proxy file of a web app that brings none. A client's idle connection outlives
    a reload until it has paused for five seconds, where nginx can do that: the next
    request may be on its way already.
    trust: addresses and networks of those who may say who the client is; path: of the log
    where requests are noted, if not where nginx notes them all; are_machines: as upstream
    has it"""
    default = ''
    if '_' in domains.split():
        default = ' default_server'

    more = ''
    if ipv6:
        more += 'listen [::]:80%s;\n    ' % default
    if version >= (1, 27, 4):
        more += 'keepalive_min_timeout 5s;\n    '
    # Before, an nginx whose servers on a port differ in this wrote past its buffer.
    if version >= (1, 19, 2):
        more += '%s;\n    ' % ' '.join(LARGE_HEADERS)

    access_log = ''
    log_format = ''
    if path:
        access_log = 'access_log %s dockhand_%s;\n    ' % (path, app)
        log_format = LOG_FORMAT.format(app=app)
    trusted, fronts = render_fronts(trust, version)
    believed = BELIEVED.format(trusted=trusted, last_but_one=LAST_BUT_ONE)
    return GENERATED.format(
        app=app, names=domains, default=default, more=more, fronts=fronts,
        but_fronts=', or what a front says that config trusts' if trust else '',
        believed=believed if trust else '', log=access_log, format=log_format,
        patience=2 if are_machines else 5)

def log_path(host, app):
    """Where the requests to an app are noted, '' where it has no such place: no folder of
    logs is here, or nginx's own log has the name."""
    has_folder = os.path.isdir(host.path(NGINX_LOGS))
    if has_folder and app not in ('access', 'error'):
        return '%s/%s.log' % (NGINX_LOGS, app)
    return ''

def render_fronts(trust, version):
    """(name of a variable, the `geo` that makes it 1 for these addresses and networks),
    or ('', '') where there are none. All files share the names of variables: this one is
    made of what is in the table, so that one name is never two tables."""
    if not trust:
        return '', ''
    import hashlib

    networks = sorted(set(trust.split()))
    if version < (1, 3, 10):            # its `geo` knows no IPv6
        networks = [network for network in networks if ':' not in network]
    lines = ''.join('    %s 1;\n' % network for network in networks)
    trusted = 'dockhand_front_' + hashlib.sha1(to_bytes(lines)).hexdigest()[:12]
    return trusted, FRONTS.format(trusted=trusted, lines=lines)

# While an app is stopped: that is no fault, as the 502 of one that has crashed
CLOSED = '''    # dockhand: the app is stopped, until a start or a push
{header}    return 503;
'''

def closed_proxy(text, version):
    """A made proxy file as it is installed while its app is stopped: nothing is passed
    on. Before 1.7.5 nginx adds no header to an answer like that."""
    header = ''
    if version >= ADD_ALWAYS:
        header = '    add_header Retry-After 60 always;\n'
    begin = 'server {\n'
    return text.replace(begin, begin + CLOSED.format(header=header), 1)

def upstream(app, places, version, are_machines=False):
    """Where `proxy_pass http://APP` leads. Where nginx can do that, it closes an idle
    connection before the app may. places: [(address, port)]; are_machines: of several
    machines, any of which may be off"""
    servers = ''.join('    server %s:%d;\n' % place for place in places)
    if are_machines:
        servers = spread_servers(app, places, version)
    limit = ''
    if version >= (1, 15, 3):
        limit = '    keepalive_timeout 1s;\n'
    return MARK + 'upstream %s {\n%s    keepalive 64;\n%s}\n' % (app, servers, limit)

def spread_servers(app, places, version):
    """The servers of an upstream on several machines. One that is off is asked every ten
    seconds, by whoever comes then. Once all have failed, each is asked again, or one lost
    packet would close a site."""
    text = ''
    if version >= (1, 9, 0):            # what one worker finds out all of them know
        text += '    zone %s 64k;\n' % app
    for place in places:
        text += '    server %s:%d max_fails=1 fail_timeout=10s;\n' % place
    for place in places:
        text += '    server %s:%d max_fails=0 backup;\n' % place
    return text

def with_backup(text, places):
    """A proxy file that turns to other places where its own do not answer.
    places: [(address, port)]"""
    body, mark, where = text.partition(MARK)
    backup = ''.join('    server %s:%d backup;\n' % place for place in places)
    return body + mark + where.replace('    keepalive', backup + '    keepalive', 1)

def server_claims(server):
    """[(what only one server of a machine can have, in words, FILE:LINE)]. Who has a name
    on port 80 has it on 443 as well."""
    for listen in server.listens:
        if listen.default:
            claim = 'default_server is taken on port %s of %s' % (
                listen.port, listen.address)
            yield claim, listen.place

        for name in server.names:
            ports = [listen.port]
            if listen.port in ('80', '443') and name not in ('', '_'):
                ports = ['80', '443']
            for port in ports:
                claim = 'server_name "%s" is taken on port %s' % (name, port)
                yield claim, server.place

def check_proxy(servers, others, known=None):
    """Failure where one of these servers takes what others have; where it gets no
    request, since it has no name and 000-dockhand.conf answers to unknown ones; or where
    it would get every request to an address, whatever the name, as the only one that
    listens on that address while others listen on the port.
    servers, others: [Server]; known: as owner_text wants it"""
    taken = dict(claim for other in others for claim in server_claims(other))
    shared_ports = set(['80'])
    for other in others:
        shared_ports.update(listen.port for listen in other.listens
                            if listen.address in ALL)

    for server in servers:
        check_is_reached(server)
        for listen in server.listens:
            refuse_if(listen.address not in ALL and listen.port in shared_ports,
                      '%s: `listen %s:%s` would take all requests to that address: write '
                      '`listen %s;`', listen.place, listen.address, listen.port,
                      listen.port)

        for claim, place in server_claims(server):
            if claim in taken:
                raise Failure('%s: %s, by %s: change one of the two', place,
                              printable(claim, 160), place_text(taken[claim], known))

def check_is_reached(server):
    """Failure for a Server without a name where unknown names are 000-dockhand.conf's."""
    has_no_name = set(server.names) <= set(['', '_'])
    is_behind_ours = all(listen.port in ('80', '443') and not listen.default
                         for listen in server.listens)
    refuse_if(has_no_name and is_behind_ours, '%s: no request reaches this server: give '
              'it a name, or default_server', server.place)

def place_text(place, known):
    """FILE:LINE of another file, for those who may know whose it is."""
    path = place.rpartition(':')[0]
    if known is None or app_of_file(path) in known:
        return place
    return owner_text(path, known)

CATCH = 'server {\n%s    server_name _;\n%s}\n'

# No certificate at all, for a nginx that takes one from a variable and cannot refuse
# without: the handshake fails
NO_CERTIFICATE = '''    set $dockhand_none "";
    ssl_certificate data:$dockhand_none;
    ssl_certificate_key data:$dockhand_none;
    return 444;
'''

# nginx's first version that adds a header to an answer like 404 too
ADD_ALWAYS = (1, 7, 5)
TOKEN_HEADER = '''map $request_uri $dockhand_token {{
    default "";
    {path} {token};
}}
add_header X-Dockhand $dockhand_token always;
'''

def render_catch_all(servers, version, ipv6, token='', has_challenges=False):
    """000-dockhand.conf: a host name that no app has gets 404, on 443 no handshake; and
    one path, of any host name, by which a push knows that it reached this server.
    servers: those of nginx's other files; version: nginx's, as a tuple; has_challenges:
    whether a certificate authority may ask for a name that no app has yet, or any more"""
    listens = [listen for server in servers for listen in server.listens]
    used = set((listen.address, listen.port) for listen in listens)

    # Before 1.3.10 nginx took included files in no order: the first server is not ours.
    is_claimed = any(listen.default and listen.port == '80' for listen in listens)
    is_first = version >= (1, 3, 10)
    default = '' if is_claimed or is_first else ' default_server'
    plain = '    listen 80%s;\n' % default
    if ipv6 and ('[::]', '80') in used:
        only = ' ipv6only=on' if version < (1, 3, 4) else ''
        plain += '    listen [::]:80%s;\n' % only

    text = '# dockhand: what no app answers to; written anew when the apps change\n'
    if token and version >= ADD_ALWAYS:
        text += TOKEN_HEADER.format(path=TOKEN_PATH, token=token)
    challenges = ''
    if has_challenges:
        challenges = indented(PASS_CHALLENGES + CHALLENGE_LOCATION % '')
    text += CATCH % (plain, challenges + '    return 404;\n')
    return text + render_secure_catch(used, version)

def render_secure_catch(used, version):
    """The server that refuses unknown names on 443, '' where nobody listens there, and
    before 1.15.9, which would have to show them a certificate. What it says of TLS holds
    for all: nginx takes the protocols from the first server of a port.
    used: {(address, port)}"""
    listens = ''
    if ('*', '443') in used:
        listens += '    listen 443 ssl;\n'
    if ('[::]', '443') in used:
        listens += '    listen [::]:443 ssl;\n'
    if not listens or version < (1, 15, 9):
        return ''

    refusal = NO_CERTIFICATE
    if version >= (1, 19, 4):
        refusal = '    ssl_reject_handshake on;\n'
    tls = ''.join('    %s;\n' % line for line in tls_lines(version))
    return CATCH % (listens, tls + refusal)

def stage_nginx_conf(text, catch_all, paths):
    """A copy of nginx.conf with our catch-all and these files for what is in conf.d."""
    included = catch_all + ''.join('include %s;\n' % path for path in paths)
    include = r'include\s+(?:/etc/nginx/)?conf\.d/\*(?:\.conf)?\s*;'
    staged, count = re.subn(include, lambda match: included, text)
    refuse_if(not count, '/etc/nginx/nginx.conf does not `include /etc/nginx/conf.d/'
              '*.conf;`: add it to its http block')

    # nginx opens its pid file for a test too: not that of the master that runs. All stays
    # in its line, for what nginx says of it.
    without_pid = re.sub(r'(?m)^[ \t]*pid\s[^;]*;', '', staged)
    return 'pid /dev/null; ' + without_pid

# What an nginx file says. servers: [Server]; directives: of conf.d or of nginx.conf's
# http block; troubles: as NginxReader has them.
ProxyFile = namedtuple('ProxyFile', 'servers directives troubles')

def read_proxy_file(text, path='nginx-proxy.conf'):
    """The ProxyFile of a text, at this path."""
    reader = NginxReader(text)
    return ProxyFile(servers_in(reader.directives, path), reader.directives,
                     reader.troubles)

def all_servers(files):
    """The [Server] of some {path: ProxyFile}."""
    return [server for file in files.values() for server in file.servers]

def plain_place(servers):
    """(host name, port) by which nginx on this machine can be asked for the first of some
    [Server] without TLS, or None."""
    for server in servers:
        names = [name for name in server.names if is_host(name)]
        ports = [listen.port for listen in server.listens if is_plain_here(listen)]
        if names and ports and ports[0]:
            return names[0].replace('*', 'any.example'), int(ports[0])
    return None

def is_host(name):
    """Whether a server_name is the name of a host, or a wildcard."""
    return name not in ('', '_') and not name.startswith('~')

def is_plain_here(listen):
    """Whether this machine itself can ask without TLS what has this Listen."""
    return listen.address in ('*', '127.0.0.1') and not listen.words

def proxy_doubts(directives):
    """[(line, text)] of what will do, but only while a name can be looked up: nginx with
    such a file does not start without."""
    upstreams = set(shared.name for shared in shared_names(directives, ''))
    for directive in all_directives(directives):
        name = directive.words[0]
        arguments = directive.words[1:]
        if not name.endswith('_pass') or not arguments:
            continue

        host = host_passed_to(arguments[0])
        is_name = re.search('[a-z]', host) and '.' in host and '$' not in arguments[0]
        if is_name and host not in upstreams and not host.startswith('unix'):
            yield directive.line, ('while `%s` cannot be looked up nginx does not start, '
                                   'for any app: an address is safer' % printable(host))

def told_of_file(release, problem):
    """What is wrong with a release's proxy file; of one that was made here, whose lines
    nobody knows, told by the host names that it was made of."""
    if not is_made(release) or not problem.startswith('nginx-proxy.conf'):
        return problem

    app = release.app
    place, _, said = problem.partition(': ')
    if ' ' in place:            # `nginx-proxy.conf clashes with another file: ...`
        return problem.replace('nginx-proxy.conf', 'the proxy file made for ' + app, 1)
    names = release.config.get('domains')
    if names:
        return 'domains="%s": %s' % (printable(names), said)
    return 'the host names %s %s.* (others: dockhand config %s domains="NAME..."): %s' % (
        app, app, app, said)

def unquoted(problem, known):
    """What nginx says of another file, without what it quotes of it."""
    place, _, said = problem.partition(': ')
    return '%s: %s' % (place_text(place, known), re.sub('"[^"]*"', '"..."', said))

# ---- What docker, ss, openssl and certbot print (pure functions) -----------------------
# Read for "Docker", "nginx" and "Certificates" below.

class StageReader(object):
    """Finds in what the older builder prints what it made, or used again, on the way.

    `Step 3/12 : FROM tools AS build` begins a stage. The first `--->` after that says
    what the stage starts from, each later ` ---> ID` is one of its layers. Its last
    layer holds its others; only that of the last stage gets a name.
    """
    def __init__(self):
        self.layers = []            # the last one of each stage
        self.has_layer = False      # whether this stage has one already
        self.awaits_start = False   # whether the next `--->` is what it starts from

    def hear(self, line):
        if re.match('(?i)Step [0-9/]+ : FROM ', line):
            self.has_layer = False
            self.awaits_start = True
            return
        if not line.startswith(' --->'):
            return
        if self.awaits_start:
            self.awaits_start = False
            return

        layer = re.match(r' ---> ([0-9a-f]{12})\Z', line)
        if layer is None:
            return
        if self.has_layer:
            self.layers.pop()
        self.layers.append(layer.group(1))
        self.has_layer = True

def read_build_cache(text):
    """{id: how often it was used} of what `docker buildx du --verbose` prints: paragraphs
    of lines, `ID: 25 letters or digits` and `Usage count: 3` among them."""
    cache = {}
    for paragraph in text.split('\n\n'):
        name = re.search(r'(?m)^ID:\s+(\w+)', paragraph)
        used = re.search(r'(?m)^Usage count:\s+(\d+)', paragraph)
        if name and used:
            cache[name.group(1)] = int(used.group(1))
    return cache

def is_cached(layer):
    """Whether a layer's id is one of buildx, and none of an image."""
    return re.match(r'[0-9a-z]{25}\Z', layer) is not None

def pool_of(network):
    """The one pool of IPv4 addresses of a network, as docker describes it, or None."""
    pools = (network.get('IPAM') or {}).get('Config') or []
    pools = [pool for pool in pools if ':' not in pool.get('Subnet', '')]
    return pools[0] if len(pools) == 1 else None

def is_our_network(network):
    """Whether a network, as docker describes it, has the shape of ours: that is how it is
    known, as those of earlier versions have no label. Docker may add a pool of IPv6."""
    pool = pool_of(network)
    if network.get('Driver') != 'bridge' or pool is None:
        return False

    subnet = pool.get('Subnet', '')
    half = subnet.rsplit('.', 2)[0]
    return (subnet == half + '.0.0/16' and pool.get('IPRange') == half + '.255.0/24'
            and pool.get('Gateway', '').split('/')[0] == half + '.0.1')

# A TCP socket as `ss` shows it. port: its own, a str; peer: (address, port), both str, of
# the other end; pids: [process id] of those that hold it, as str
Socket = namedtuple('Socket', 'state port peer pids')

def read_sockets(text):
    """[Socket] of what `ss -tanp` prints: a head, and lines of a state, two counts, two
    times ADDRESS:PORT, and users:(("nginx",pid=6,fd=3)), once users:(("nginx",6,3))."""
    sockets = []
    for line in text.split('\n')[1:]:
        fields = line.split()
        if len(fields) < 5:
            continue

        pids = re.findall(r',(?:pid=)?(\d+),', ' '.join(fields[5:]))
        own_port = fields[3].rpartition(':')[2]
        address, _, port = fields[4].rpartition(':')
        sockets.append(Socket(fields[0], own_port, (address, port), pids))
    return sockets

def pem_blocks(text):
    """The certificates and keys in a text, [str], each from BEGIN to END."""
    blocks = []
    lines = None                    # of the block that is being read
    for line in text.splitlines():
        line = line.strip()
        if line.startswith('-----BEGIN '):
            lines = []
        if lines is None:
            continue

        lines.append(line)
        if line.startswith('-----END ') and line.endswith('-----'):
            blocks.append('\n'.join(lines))
            lines = None
    return blocks

# What a certificate says. names: [str] that it is good for; issuer: who signed it;
# begins, ends: in seconds since 1970
X509 = namedtuple('X509', 'names issuer begins ends')

def read_x509(said):
    """The X509 in what `openssl x509 -issuer -dates -text` prints, or None."""
    issuer = re.search(r'(?m)^issuer=.*?(?:CN|O) ?= ?([^,/\n]+)[^=\n]*$', said)
    begins = re.search(r'(?m)^notBefore=(.*)$', said)
    ends = re.search(r'(?m)^notAfter=(.*)$', said)
    alternatives = re.search(r'X509v3 Subject Alternative Name:.*\n(.*)', said)
    if not begins or not ends:
        return None

    names = []
    if alternatives:
        names = re.findall(r'DNS:([^\s,]+)', alternatives.group(1))
    return X509([name.lower() for name in names],
                issuer.group(1) if issuer else 'somebody without a name',
                seconds_of(begins.group(1)), seconds_of(ends.group(1)))

def seconds_of(moment):
    """`Nov 29 01:00:00 2026 GMT`, as openssl prints a moment, in seconds since 1970."""
    import calendar
    return calendar.timegm(time.strptime(moment.strip(), '%b %d %H:%M:%S %Y GMT'))

def certbot_reason(said):
    """Why certbot got no certificate, in a line, of all that it printed: what the
    authority says in detail, or else the line behind `An unexpected error`."""
    lines = [line.strip() for line in said.splitlines()]
    for at, line in enumerate(lines):
        if line.startswith('Detail:'):
            detail_lines = lines[at:]
            end = detail_lines.index('') if '' in detail_lines else len(detail_lines)
            return without_tokens(' '.join(detail_lines[:end])[len('Detail:'):].strip())
        if line.startswith('An unexpected error occurred') and lines[at + 1:]:
            reason = without_tokens(lines[at + 1])
            return 'certbot: ' + re.sub(r'^[\w.]*Error: ', '', reason)

    told = [line for line in lines if line]
    told = [line for line in told if not re.match(CERTBOT_NOISE, line)]
    return 'certbot: ' + without_tokens(told[-1] if told else 'it says nothing')

CERTBOT_NOISE = (
    r'(Saving debug log|Ask for help|Some challenges have failed|- - |\(PATH is )')

def without_tokens(reason):
    """A reason without what is another one each time: the file that was asked for."""
    return plain_line(re.sub(CHALLENGE_PATH + r'[\w-]+', CHALLENGE_PATH + '...', reason))

def renewal_reason(log_text, lineage):
    """Why a certificate was not renewed the last time, by certbot's own log, or ''. What
    the authority said stands before the line that names it."""
    failure = 'Failed to renew certificate %s with error: ' % lineage
    before, mark, after = log_text.rpartition(failure)
    if not mark:
        return ''

    told = before[before.rfind(':Notifying user: Renewing'):]
    if 'Detail:' in told:
        return certbot_reason(told)
    return plain_line(after.partition('\n')[0])

# ---- The machine: init, disk, routes ---------------------------------------------------
# What differs between hosts, and is neither docker's nor nginx's.

def is_systemd(host):
    return os.path.isdir(host.path('/run/systemd/system'))

def is_upstart(host):
    """Whether PID 1 is Upstart (its tools may lie beside another init)."""
    if host.upstart is None:
        there = not is_systemd(host) and os.path.exists(host.path('/sbin/initctl'))
        host.upstart = there and 'upstart' in host.ask(['initctl', 'version']).out
    return host.upstart

def check_not_foreign(host, path, app):
    """Failure where a file is there that dockhand did not write for this app."""
    text = read_file(host.path(path))
    refuse_if(text is not None and not is_ours(text, app), '%s is on this server '
              'already, and not from dockhand: rename the app, or that', path)

def has_ipv6(host):
    return os.path.exists(host.path('/proc/net/if_inet6'))

START_CRON = 'service cron start'

def cron_missing(host):
    """What a crontab wants and is not on this server, or nothing, and what to type: a row
    for `demand`."""
    for package, paths in (('cron', ('/usr/sbin/cron', '/usr/sbin/crond')),
                           ('util-linux', ('/usr/bin/flock', '/bin/flock')),
                           ('bsdutils', ('/usr/bin/logger', '/bin/logger'))):
        if not any(os.path.exists(host.path(path)) for path in paths):
            name = os.path.basename(paths[0])
            return name + ' is missing', 'apt-get install ' + package
    return '', ''

def runs_cron(host):
    """Whether cron runs, by the process id that it leaves."""
    pid = host.text('/run/crond.pid').strip()
    return pid.isdigit() and os.path.isdir(host.path('/proc', pid))

def zone_of(host):
    """The time zone of this server's clock, as cron reads it: a name, Etc/UTC."""
    clock = host.path('/etc/localtime')
    if os.path.islink(clock):
        return printable(os.readlink(clock).rpartition('zoneinfo/')[2])
    if not os.path.exists(clock):
        return 'UTC'
    return printable(host.text('/etc/timezone').strip() or time.tzname[0])

def free_bytes(host, path):
    found = os.statvfs(host.path(path))
    return found.f_bavail * found.f_frsize

@contextmanager
def stream_folder(host):
    """A folder for what is copied or has come in, which is removed afterwards. The git
    user may go through it, to what is its own there, and look into nothing."""
    sweep_streams(host)
    folder = stream_path(host)
    for path in (os.path.dirname(folder), folder):
        make_folder(path, 0o711)
    try:
        yield folder
    finally:
        host.run(['rm', '-rf', '--', folder])

def stream_path(host):
    """Where this process puts what goes to another server, or comes from there."""
    return host.path(STREAMS, own_mark(host).replace(' ', '-'))

def sweep_streams(host):
    """Remove what a command that was killed has left there."""
    for name in list_folder(host.path(STREAMS)):
        mark = name.partition('.')[0].replace('-', ' ', 1)
        if not is_attended(host, mark):
            host.run(['rm', '-rf', '--', host.path(STREAMS, name)])

LARGE_ROUTE = r'(\w+ )?default|\d+\.0\.0\.0/1 '

def is_routed(host, subnet):
    """Whether a route that is no default (nor half of one, as of a VPN) touches a /16."""
    for how in ('root', 'match'):           # routes of parts of it; of all of it
        shown = host.ask(['ip', '-4', 'route', 'show', how, subnet + '.0.0/16']).out
        for route in shown.splitlines():
            # `10.8.0.0/24 dev tun0`, `unreachable default`, `128.0.0.0/1 via 10.8.0.1`
            if route[:1].isalnum() and not re.match(LARGE_ROUTE, route):
                return True
    return False

def host_lock(host):
    """What apps share (names, nginx) changes under this lock, taken after the app's. For
    which one it is held is not told: who waits may have no right to know of that."""
    return locked(host.path(LOCKS, '.host'), 'a change of nginx')

HEAD_END = b'\r\n\r\n'            # of an answer

def fetch_status(host, name, port, timeout=5, address='127.0.0.1', is_tls=False):
    """What nginx on this machine, or what is at an address, answers to a request for a
    host name: `200`, or `nothing`, with a reason if there is one."""
    try:
        return status_in(fetch_head(host, name, port, timeout, address, is_tls=is_tls))
    except EnvironmentError as error:
        return 'nothing (%s)' % error

def status_in(head):
    """The status in the head of an answer; `nothing` where it is none."""
    words = head[:100].split()
    if words[1:] and words[0].startswith('HTTP/'):
        return words[1]
    return 'nothing'

def fetch_head(host, name, port, timeout, address, path='/', is_tls=False, end=HEAD_END):
    """What an address answers to a request for a host name, up to 16 KB, to the end of
    its head, or to other bytes."""
    connection = host.connect((address, port), timeout, name if is_tls else None)
    deadline = host.clock.monotonic() + timeout
    head = b''
    try:
        connection.settimeout(timeout)
        connection.sendall(to_bytes(
            'GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: dockhand\r\n'
            'Connection: close\r\n\r\n' % (path, name)))

        while len(head) < 16384 and host.clock.monotonic() < deadline:
            data = connection.recv(4096)
            head += data
            if not data or end in head:
                break
    finally:
        connection.close()
    return to_text(head)

# ---- Docker ----------------------------------------------------------------------------
# Everything that is asked of docker and is not about one engine's way to run an app.

# How a failed build ends, and what to say.
BUILD_TROUBLE = [
    (r'code:? 137\b', 'out of memory (137), the kernel killed it: give the server more'),
    ('exec format error', 'exec format error: an image for another kind of processor'),
    ('no space left', 'no space left on device; nothing has changed'),
    ('', 'nothing has changed; mend it and push again')]

# What the older builder says before each build where docker has no buildx
ADVICE = ('DEPRECATED: The legacy builder is deprecated',
          '            Install the buildx component',
          '            https://docs.docker.com/go/buildx/')

# What nobody misses of a container that goes: a `/` is behind the path
PASSING = r'''(?x)
    /(dev|proc|run|sys|tmp|var/run|var/tmp|var/cache)/
  | (/usr)?/sbin/docker-init/
  | /\.dockerenv/
  | /etc/(hosts|hostname|resolv\.conf|mtab)/
  | .*/(__pycache__|\.cache)/'''

# Of `docker inspect`: names of one kind alone
IMAGES = ('--type=image',)
CONTAINERS = ('--type=container',)

class Docker(object):
    """The docker engine of this machine, by its own command."""
    def __init__(self, host):
        self.host = host

    # The engine itself

    def version(self):
        """The version of the engine, as a tuple; Failure where it does not answer."""
        _, out, err = self.host.ask(['docker', 'version'])
        shown = re.search(r'Server(?: version:|:.*?\bVersion:)\s*(\d[\d.]*)', out, re.S)
        refuse_if(not shown, 'docker does not answer: ' + last_line(err or out))
        return tuple(map(int, re.findall(r'\d+', shown.group(1))))

    def wait(self, patience=60):
        """Wait until docker answers: at boot some inits go on before it does."""
        clock = self.host.clock
        told = False
        deadline = clock.monotonic() + patience
        while self.host.ask(['docker', 'version']).status:
            if clock.monotonic() > deadline:
                break

            if not told:
                step('Waiting for docker, which does not answer')
            told = True
            clock.sleep(0.5)
        self.version()

    def kept_ports(self):
        """{(docker-proxy's process id, port)} that docker keeps for no running container.
        `docker ps -q` does not list one that is just being started; to inspect all of
        them waits until that is done."""
        proxies = children(self.host, self.host.text('/run/docker.pid').strip())
        kept = set((pid, port) for pid, title in proxies.items()
                   for port in re.findall(r'docker-proxy\0.*-host-port\0(\d+)', title))
        if not kept:
            return kept

        used = set()
        for container in self.running(None, '-aq'):
            published = container['NetworkSettings'].get('Ports') or {}
            for places in published.values():
                used.update(place['HostPort'] for place in places or [])
        return set((pid, port) for pid, port in kept if port not in used)

    def free_ports(self, patience=10):
        """Restart docker where it keeps a port, as after a power cut while it started an
        app: nobody can have that port, or it leads to another app
        (moby/libnetwork#2448)."""
        clock = self.host.clock
        kept = self.kept_ports()
        deadline = clock.monotonic() + patience
        while kept and clock.monotonic() < deadline:
            clock.sleep(0.1)                # one may be of a container that stops
            kept &= self.kept_ports()
        if not kept:
            return

        port = min(kept)[1]
        refuse_if(not is_systemd(self.host) and not is_upstart(self.host),
                  'docker keeps port %s for no container: restart it, then: sudo '
                  'dockhand recover', port)
        step('docker keeps port %s for no container; restarting it', port)
        self.host.run(['service', 'docker', 'restart'])
        self.wait()

    def has_init(self):
        """Whether it has an init for containers: from 1.13 on, if it is packaged."""
        return any(os.path.exists(self.host.path(folder, 'docker-init'))
                   for folder in INIT_FOLDERS)

    # Containers

    def inspect(self, *names):
        """Its description of containers and images, as [dict]; no unknown names."""
        if not names:
            return []
        argv = ('docker', 'inspect') + names
        return self.described(argv, self.host.ask(argv))

    @contextmanager
    def inspecting(self, names, kind=()):
        """The same, asked beside what is done inside the `with`: a function that waits
        for the answer and gives it.
        kind: IMAGES or CONTAINERS where all are that, as docker knows from 1.8 on. For a
        name of any kind that it does not know it looks through its networks, volumes and
        swarm: that takes as long again"""
        if not names:
            yield list
            return
        argv = ('docker', 'inspect') + kind + tuple(names)
        with self.host.begin(argv) as asked:
            yield lambda: self.described(argv, asked.result())

    def described(self, argv, result):
        """What `docker inspect` says of the names that docker knows, as [dict]."""
        import json
        self.host.check_result(result, argv, 'no such (object|image|container)')
        return json.loads(result.out or '[]')

    def running(self, image=None, listed='-q'):
        """Its description of the containers that run (an image, by id), newest first.
        listed: `-aq` to ask for those too that `docker ps` shows as running later"""
        ids = self.host.run(['docker', 'ps', listed, '--no-trunc']).split()
        if not ids:
            return []
        containers = self.inspect(*ids)
        if image is not None:
            containers = [container for container in containers
                          if container['Image'] == image]
        running = [container for container in containers
                   if container['State']['Running']
                   and not re.match(RUN_NAME, container.get('Name') or '')]
        return sorted(running, reverse=True,
                      key=lambda container: container['State']['StartedAt'])

    @contextmanager
    def updating(self, names, policy):
        """Say whether docker starts some containers again by itself, beside what is done
        inside the `with`."""
        words = ('update', '--restart', policy)
        with self.host.begin(('docker',) + words + tuple(names)) as update:
            yield
            result = update.result()
        if result.status:                   # one may be gone: what of the others?
            self.on_containers(names, *words)

    def on_containers(self, names, *words):
        """Run a command on some containers; False where one of them is gone."""
        if not names:
            return True
        argv = ('docker',) + words + tuple(names)
        if self.host.run_unless('No such container|marked for removal', argv):
            return True

        # What it says of one that is gone must not hide what went wrong with another.
        if len(names) > 1:
            for name in names:
                self.on_containers([name], *words)
        return False

    def remove_containers(self, names, *options):
        """Remove some containers, whether they run or are gone. Where docker is removing
        one already, as after a `docker run --rm`, its name is free only after that."""
        if not names:
            return
        argv = ['docker', 'rm', '-f'] + list(options) + list(names)
        result = self.host.ask(argv)
        self.host.check_result(result, argv, 'No such container|already in progress')
        if result.status and len(names) > 1:
            for name in names:
                self.remove_containers([name], *options)
        elif 'already in progress' in result.err:
            self.wait_until_gone(names[0])

    def wait_until_gone(self, container, patience=10):
        clock = self.host.clock
        deadline = clock.monotonic() + patience
        while self.inspect(container):
            refuse_if(clock.monotonic() > deadline, 'docker does not come to an end with '
                      'removing %s', container)
            clock.sleep(0.1)

    def written_files(self, container):
        """What a container wrote outside its volumes, as [path], but what is passing, and
        what docker itself makes."""
        lines = self.host.ask(['docker', 'diff', container]).out.splitlines()
        paths = sorted(line[2:] + '/' for line in lines)
        written = []
        for path, following in zip(paths, paths[1:] + ['']):
            is_parent = following.startswith(path)      # it only holds what is new
            if not is_parent and not re.match(PASSING, path):
                written.append(path[:-1])

        described = self.inspect(container) if written else []
        mounts = [mount['Destination'].rstrip('/') for each in described
                  for mount in each.get('Mounts') or []]
        return [path for path in written if path not in mounts]

    # Images

    def build(self, folder, tag, layers, options=(), env=None, beside=None):
        """Build an image from a folder; the output goes to the pusher as it comes.
        options: words of `docker build`; env: variables that these name; beside: as
        execute has it
        layers: a list, gets the ids of what it made, or used again, on the way: of images
        with the older builder, of what buildx keeps with that (there also what somebody
        else builds meanwhile, which is but a cache)"""
        heard = deque(maxlen=200)
        stages = StageReader()
        before = self.build_cache()

        def hear(line):
            stages.hear(line)
            if line and not line.startswith(ADVICE):
                heard.append(line)
                detail(line)
        argv = ('docker', 'build', '--force-rm', '-t', tag) + tuple(options) + (folder,)
        try:
            status = self.host.ask(argv, each=hear, idle=say_busy, beside=beside,
                                   env=env).status
        finally:
            after = self.build_cache()
            layers.extend(stages.layers)
            layers.extend(name for name in sorted(after)
                          if after[name] != before.get(name))
        if status == 0:
            return

        self.version()                      # is that what is wrong?
        said = 'code %d\n' % status + '\n'.join(heard)
        reasons = [why for pattern, why in BUILD_TROUBLE if re.search(pattern, said)]
        raise Failure('the build failed: ' + reasons[0])

    def tag(self, source, target):
        """Move a tag."""
        with self.tagging(source, target):
            pass

    @contextmanager
    def tagging(self, source, target):
        """Move a tag beside what is done inside the `with`. Docker before 1.10 wants to
        be told that it may."""
        argv = ['docker', 'tag', source, target]
        with self.host.begin(argv) as tag:
            yield
            result = tag.result()
        self.host.check_result(result, argv, 'is already')
        if result.status:
            self.host.run(['docker', 'tag', '-f', source, target])

    def untag(self, tag, *options):
        """Take a tag away, and an unused image with it; False where a container uses
        it."""
        argv = ('docker', 'rmi') + options + (tag,)
        if self.host.run_unless('no such image|container', argv):
            return True
        return not self.inspect(tag)

    def build_cache(self):
        """{id: how often it was used} of all that buildx keeps; {} where it is not."""
        if not any(os.path.exists(self.host.path(folder, 'docker-buildx'))
                   for folder in PLUGIN_FOLDERS):
            return {}
        shown = self.host.ask(['docker', 'buildx', 'du', '--verbose']).out
        return read_build_cache(shown)

    def remove_layers(self, layers):
        """Remove what builds have made on the way, [id], but for what has a name, is used
        by a container, or is part of something that stays. Gives those that may be there
        yet: buildx does not say what an image holds."""
        cached = list(filter(is_cached, layers))
        if cached:
            which = 'id=/(%s)/' % '|'.join(sorted(set(cached)))
            self.host.ask(['docker', 'builder', 'prune', '-f', '--filter', which])

        images = [layer for layer in layers if layer not in cached]
        found = self.inspect(*images) if images else []
        nameless = []
        for image in found:
            has_name = image.get('RepoTags') or image.get('RepoDigests')
            if not has_name and image['Id'] not in nameless:
                nameless.insert(0, image['Id'])     # a stage may begin with another

        left = cached
        if nameless and self.host.ask(['docker', 'rmi'] + nameless).status:
            left = layers                           # docker does not say which
        return left

    # The network, and volumes

    def subnet(self, given=()):
        """The first half of our addresses: that of releases, our network's, or a free
        one. given: [address] of releases"""
        if given:
            return given[0].rsplit('.', 2)[0]
        networks = self.networks()
        if networks:
            pool = pool_of(networks[0]) or {}
            subnet = pool.get('Subnet', '')
            refuse_if(not subnet.endswith('.0.0/16'), "docker's network %s was made by "
                      'hand, and has no /16 of IPv4: docker network rm %s', NETWORK,
                      NETWORK)
            return subnet.rsplit('.', 2)[0]

        for subnet in SUBNETS:
            if not is_routed(self.host, subnet):
                return subnet
        raise Failure('no /16 of 10.86 to 172.31 is free for the network of the apps')

    def networks(self):
        """Its description of the network that is called as ours, as [dict]."""
        import json
        shown = self.host.ask(['docker', 'network', 'inspect', NETWORK]).out
        return native(json.loads(shown or '[]') or [])

    def ensure_network(self, address):
        """Our network, for one of its addresses; docker's own choices come from its
        end."""
        create = ('docker network create --subnet={0}.0.0/16 --ip-range={0}.255.0/24 '
                  '--gateway={0}.0.1').format(address.rsplit('.', 2)[0]).split()
        mtu = self.mtu()
        if mtu:
            create.append('--opt=com.docker.network.driver.mtu=' + mtu)
        self.host.run_unless('already exists', create + [NETWORK])

    def mtu(self):
        """How large docker is told that packets may be, or None. It holds that for its
        default network alone, but for `default-network-opts`."""
        settings = self.host.text('/etc/docker/daemon.json')
        if 'com.docker.network.driver.mtu' in settings:
            return None
        said = re.findall(r'"mtu"\s*:\s*([1-9]\d*)', settings)

        pid = self.host.text('/run/docker.pid').strip()
        if pid.isdigit():
            title = self.host.text('/proc', pid, 'cmdline')
            said += re.findall(r'\0--mtu[=\0]([1-9]\d*)\0', title)
        return said[0] if said else None

    def remove_network(self):
        """Take our network away; not another of that name, nor one in which somebody has
        a container, which docker would keep only if that runs."""
        if not any(is_our_network(network) for network in self.networks()):
            return
        inside = self.host.ask(['docker', 'ps', '-aq', '--filter', 'network=' + NETWORK])
        if inside.status == 0 and not inside.out.strip():
            self.host.ask(['docker', 'network', 'rm', NETWORK])

    def volumes(self):
        """The names of all volumes."""
        return self.host.run(['docker', 'volume', 'ls', '-q']).split()

    def volumes_of(self, name):
        """Those that an app of this name left."""
        return [volume for volume in self.volumes() if volume.startswith(name + '--')]

    def volume_folder(self, name):
        """Where a volume keeps its files; None of one that a driver has elsewhere, or
        that is a device, which is mounted only while a container has it."""
        import json
        shown = self.host.run(['docker', 'volume', 'inspect', name])
        volume = native(json.loads(shown))[0]
        path = self.host.path(volume['Mountpoint'])
        is_here = volume['Driver'] == 'local' and not volume.get('Options')
        return path if is_here and os.path.isdir(path) else None

    # Its disk

    def images_folder(self):
        settings = self.host.text('/etc/docker/daemon.json')
        moved = re.findall(r'"(?:data-root|graph)"\s*:\s*"([^"]+)"', settings)
        return moved[0] if moved else '/var/lib/docker'

    def check_space(self, wanted=SPACE):
        """Failure where a build would find less room than it wants. wanted: in MB"""
        for path in (self.images_folder(), '/var/lib/containerd', STATE):
            if not os.path.isdir(self.host.path(path)):
                continue
            free = free_bytes(self.host, path) // 1000000
            refuse_if(free < wanted, '%d MB are free on %s, a build wants %d: see docker '
                      'image prune', free, path, wanted)

    def trial_file(self, name):
        """What is written to its disk before the app of this name is stopped, to see if
        it can be."""
        return temporary_of(self.host.path(self.images_folder(), 'dockhand-' + name))

    def check_takes_writes(self, name):
        """Failure where its disk is full: `docker stop` works there, no start does."""
        path = self.trial_file(name)
        if not os.path.isdir(os.path.dirname(path)):
            return

        try:
            with open(path, 'wb') as target:
                target.write(b' ' * WRITTEN)
                target.flush()
                os.fsync(target.fileno())
        except EnvironmentError as error:
            raise Failure('docker could start nothing: %s: %s', os.path.dirname(path),
                          error.strerror)
        finally:
            remove_file(path)

# ---- Machines: docker's own swarm, whose one manager this server is --------------------
# Which other machines run containers, and what each has of the images. All that there is
# to know of one docker's manager keeps. Uses docker, and root's own ssh.

OLDEST_SWARM = (20, 10)             # docker that knows all options of a service
NODE_PATIENCE = 30                  # seconds for a machine to come or to go
SSH = ['ssh', '-o', 'BatchMode=yes', '-o', 'ConnectTimeout=5',
       '-o', 'ServerAliveInterval=5', '-o', 'ServerAliveCountMax=3']

# A machine of the swarm. state: docker's word, `ready` or `down`; labels: {name: value};
# kind: of its processor; docker: the version there
Machine = namedtuple('Machine', 'id name address is_front state is_active labels kind '
                     'docker')

def read_machine(node):
    """The Machine that `docker node inspect` describes."""
    manager = node.get('ManagerStatus') or {}
    told = node['Description']
    address = node['Status'].get('Addr', '')
    if manager.get('Addr'):         # that of a manager is told as 0.0.0.0 elsewhere
        address = manager['Addr'].rpartition(':')[0]

    return Machine(
        id=node['ID'], name=told['Hostname'], address=address, is_front=bool(manager),
        state=node['Status']['State'], is_active=node['Spec']['Availability'] == 'active',
        labels=node['Spec'].get('Labels') or {}, kind=told['Platform']['Architecture'],
        docker=told['Engine']['EngineVersion'])

def is_up(machine):
    """Whether docker's manager hears of a machine, and may have it run something."""
    return machine.state == 'ready' and machine.is_active

def state_text(machine):
    return machine.state if machine.is_active else 'drained'

# A task of a service: a container of it on a machine. state: docker's word and since when
Task = namedtuple('Task', 'id machine wanted state error')

def read_tasks(text):
    """[Task] of what `docker service ps` prints in TASK_FORMAT."""
    return [Task(*line.split('\t')) for line in text.splitlines()
            if line.count('\t') == 4]

TASK_FORMAT = '{{.ID}}\t{{.Node}}\t{{.DesiredState}}\t{{.CurrentState}}\t{{.Error}}'

# sh for a machine: its images, described; one of them taken in, or called by a tag, and
# its id; all that is left of a release
DESCRIBE_IMAGES = 'docker image ls -aq --no-trunc | sort -u | xargs -r docker inspect'
TAKE_IMAGE = 'docker load -q >/dev/null && docker inspect --format "{{.Id}}" "$1"'
HAS_IMAGE = 'docker image inspect "$1" >/dev/null 2>&1'
TAG_IMAGE = 'docker tag "$2" "$1" && docker inspect --format "{{.Id}}" "$1"'
DROP_IMAGE = '''docker ps -aq --filter label=com.docker.swarm.service.name="$2" |
    xargs -r docker rm -f -v >/dev/null 2>&1
! docker inspect "$1" >/dev/null 2>&1 || docker rmi "$1" >/dev/null'''
DROP_CONTAINERS = '''docker ps -aq --filter label=com.docker.swarm.service.name="$1" |
    xargs -r docker rm -f -v'''

class Machines(object):
    """The machines of docker's swarm: this server, and those that it was told of."""
    def __init__(self, host):
        self.host = host
        self.patience = NODE_PATIENCE   # until docker's manager answers, once for all

    def are_any(self):
        """Whether there are others; docker is not asked."""
        return os.path.exists(self.host.path(MACHINES))

    def subnet(self):
        """The first half of the addresses of what the swarm makes on each machine."""
        return self.host.text(MACHINES).strip()

    def all(self):
        """The [Machine], this server first; none where there is no other. After a boot
        docker's manager takes some seconds."""
        import json
        if not self.are_any():
            return []
        argv = ['docker', 'node', 'ls', '-q']
        listed = self.host.ask(argv)
        while listed.status and self.patience > 0:
            self.host.clock.sleep(0.5)
            self.patience -= 0.5
            listed = self.host.ask(argv)
        self.host.check_result(listed, argv, NEVER)

        shown = self.host.run(['docker', 'node', 'inspect'] + listed.out.split())
        machines = [read_machine(node) for node in native(json.loads(shown))]
        return sorted(machines, key=lambda machine: (not machine.is_front, machine.name))

    def front(self):
        """This server, as a Machine."""
        return self.all()[0]

    def addresses(self):
        """[address] of all that may run something, be they off at this moment."""
        return [machine.address for machine in self.all() if machine.is_active]

    def ask(self, machine, script, *words, **options):
        """Have a machine run some sh, whose $1 and so on are words; its Result."""
        argv = ['sh', '-c', script, 'sh'] + list(words)
        if not machine.is_front:
            argv = SSH + ['root@' + machine.address, ' '.join(map(quote, argv))]
        return self.host.ask(argv, **options)

    def told(self, machine, script, *words, **options):
        """The same of sh that must succeed; its standard output."""
        result = self.ask(machine, script, *words, **options)
        refuse_if(result.status, '%s: %s', machine.name,
                  last_line(result.err or result.out) or 'it says nothing')
        return result.out

    # Its labels

    def label(self, machine, *words):
        """Change a machine's labels, one command at a time: docker's manager refuses the
        second of two."""
        with locked(self.host.path(LOCKS, '.machines'), 'a change of machines'):
            self.host.run(['docker', 'node', 'update'] + list(words) + [machine.id])

    # Images

    def ship(self, machine, tag, image, save):
        """Bring an image to a machine, but for those of its layers that this has; gives
        the bytes that were sent. image: its id; save: as `saving` gives it"""
        layers = self.host.docker.inspect(tag)[0]['RootFS']['Layers']
        there = read_jsons(self.told(machine, DESCRIBE_IMAGES))

        sent = 0
        if any(found['Id'] == image for found in there):
            got = self.told(machine, TAG_IMAGE, tag, image)
        else:
            chains = [found['RootFS'].get('Layers') or [] for found in there]
            count = common_layers(layers, chains)
            got, sent = self.send(machine, save(), tag, count)
        refuse_if(got.strip() != image, '%s: docker there gives the image another id, as '
                  'with another image store than here: "features": '
                  '{"containerd-snapshotter": false} in /etc/docker/daemon.json of both, '
                  'and restart docker', machine.name)
        return sent

    @contextmanager
    def saving(self, tag):
        """Inside a `with`, a function that gives the path of a file with an image as
        `docker save` has it: written once, if anybody wants it."""
        path = stream_path(self.host) + '.image'

        def save():
            if not os.path.exists(path):
                sweep_streams(self.host)
                make_folder(os.path.dirname(path), 0o711)
                self.host.run(['docker', 'save', '-o', path, tag])
            return path
        try:
            yield save
        finally:
            remove_file(path)

    def send(self, machine, path, tag, count):
        """Send a machine an image without its first layers: (what it says then, the bytes
        that were sent). path: of all of it, as saved; count: how many layers"""
        import tarfile
        reduced = path + '.part'
        try:
            with tarfile.open(path) as whole:
                left_out = files_left_out(whole, count)
                with create_file(reduced) as target, \
                        tarfile.open(fileobj=target, mode='w') as part:
                    for member in whole:
                        if member.name in left_out:
                            continue
                        content = None
                        if member.isreg():
                            content = whole.extractfile(member)
                        part.addfile(member, content)

            with open(reduced, 'rb') as stream:
                said = self.told(machine, TAKE_IMAGE, tag, stdin=stream)
            return said, os.path.getsize(reduced)
        finally:
            remove_file(reduced)

    def bring(self, release, tag):
        """Have the machines of a release have its image, and be labelled for it, where
        they can be reached: ([Machine] that have it and are up, ['web3 is down'] of the
        others). On one that nginx does not ask it is never to run."""
        having = []
        wrong = []
        with self.saving(tag) as save:
            for machine in self.all():
                if machine.address not in release.machines:
                    continue
                if not is_up(machine):
                    wrong.append('%s is %s' % (machine.name, state_text(machine)))
                    continue
                try:
                    self.bring_to(machine, release, tag, save)
                    having.append(machine)
                except Failure as problem:
                    wrong.append(str(problem))
        return having, wrong

    def bring_to(self, machine, release, tag, save):
        """The same for one machine; Failure where that cannot be had."""
        label = machine_label(release)
        is_labelled = machine.labels.get(label) == release.image
        if is_labelled and self.has_image(machine, release.image):
            return
        if not machine.is_front:
            sent = self.ship(machine, tag, release.image, save)
            detail('%.1f MB to %s', sent / 1e6, machine.name)
        self.label(machine, '--label-add', '%s=%s' % (label, release.image))

    def has_image(self, machine, image):
        """Whether a machine has an image still, by its id; of this server that is asked
        for elsewhere."""
        return machine.is_front or self.ask(machine, HAS_IMAGE, image).status == 0

    def drop(self, machine, label):
        """Take the image of a release from a machine, and then the label for it, if it
        came so far; False where that must wait for another time."""
        app, number = read_machine_label(label)
        if not machine.is_front:
            if not is_up(machine):
                return False
            service = '%s--%d' % (app.replace('.', '-_'), number)
            gone = self.ask(machine, DROP_IMAGE, '%s:%d' % (app, number), service)
            if gone.status:
                return False

        if label in machine.labels:
            self.label(machine, '--label-rm', label)
        return True

    # Its network, and services

    def join(self, name, alias):
        """Have a container of this server be on the network of all machines too, where it
        is called by an alias, if it has one. One on the network of the server itself, by
        a job's word, can be on no other."""
        words = ['--alias', alias] if alias else []
        self.host.run_unless(
            'already exists|already attached|No such container|cannot be connected',
            ['docker', 'network', 'connect'] + words + [OVERLAY, name])

    def tasks(self, service):
        """The [Task] of a service, newest first; [] where there is no such service."""
        argv = ['docker', 'service', 'ps', '--no-trunc', '--format', TASK_FORMAT, service]
        result = self.host.ask(argv)
        self.host.check_result(result, argv, 'no such service')
        return read_tasks(result.out)

    def scale(self, service, count):
        """Say on how many machines a service is to run; False where it is gone."""
        argv = ['docker', 'service', 'scale', '-d', '%s=%d' % (service, count)]
        return self.host.run_unless('no such service|not found', argv)

    def wanted(self):
        """{service: on how many machines it is to run}."""
        argv = ['docker', 'service', 'ls', '--format', '{{.Name}} {{.Replicas}}']
        found = re.findall(r'(?m)^(\S+) \d+/(\d+)', self.host.run(argv))
        return dict((name, int(count)) for name, count in found)

def read_jsons(text):
    """[dict] of several lists of JSON, one after the other."""
    import json
    decoder = json.JSONDecoder()
    found = []
    text = text.strip()
    while text:
        some, end = decoder.raw_decode(text)
        found += native(some)
        text = text[end:].lstrip()
    return found

def common_layers(layers, chains):
    """How many of the first layers of an image another machine has: each of them counts
    only where all below it are there. chains: the layers of that machine's images"""
    count = 0
    while count < len(layers):
        wanted = layers[:count + 1]
        if not any(chain[:count + 1] == wanted for chain in chains):
            break
        count += 1
    return count

def files_left_out(whole, count):
    """The names in a `docker save` of what has its first layers alone. whole: a TarFile;
    count: of layers"""
    import json
    manifest = json.loads(to_text(whole.extractfile('manifest.json').read()))
    paths = manifest[0]['Layers']

    # Docker before 25 writes a layer that an image has twice once, and a link to it.
    needed = set(paths[count:])
    for member in whole:
        if member.issym() and member.name in needed:
            folder = os.path.dirname(member.name)
            needed.add(os.path.normpath(os.path.join(folder, member.linkname)))
    return set(paths[:count]) - needed

# ---- nginx -----------------------------------------------------------------------------
# Its configuration as it lies there, one app's file in it, and its processes. Uses the
# proxy files' sections.

def remove_if_empty(path):
    """Remove a file or a folder that we made, and nothing was written to."""
    if os.path.isdir(path):
        if not os.listdir(path):
            os.rmdir(path)
    elif os.path.exists(path) and not os.path.getsize(path):
        os.unlink(path)

# The one of another app that is asked before and after a reload
Neighbour = namedtuple('Neighbour', 'app name port status')

NO_ANSWERS = ('400', '401', '403', '404', '444')    # what a file can make of other apps

def refused_certificate(said):
    """The file of ours with a certificate that nginx says it cannot load, or None."""
    match = re.search(r'"(%s/[^"]+\.pem)"' % CERTIFICATES, said)
    return match.group(1) if match else None

@contextmanager
def telling_of_file(release):
    """What a Failure says of lines of a proxy file that was made here is told by what it
    was made of: nobody has seen them."""
    try:
        yield
    except Failure as problem:
        raise Failure('%s', told_of_file(release, str(problem)))

def is_working(title):
    """Whether this is the command line of a worker that still takes requests."""
    return 'nginx' in title and 'shutting down' not in title

NGINX_TEST = ('nginx', '-t', '-q')
TRIAL = '.test'                 # ends the name of a file that is but tested

def problem_of(result):
    """What a Result of `nginx -t` says first, as `FILE:LINE: what is wrong`, or ''."""
    if result.status == 0:
        return ''
    lines = re.findall(r'\[(?:emerg|alert|crit|error)\] (?:\d+#\d+: )?(.*)', result.err)
    said = plain_line(lines[0] if lines else result.err.strip() or 'nginx -t failed')

    # `unknown directive "x" in FILE:1`
    text, _, place = said.rpartition(' ')
    if not re.match(r'\S+:\d+\Z', place):
        return said
    if text.endswith(' in'):
        text = text[:-len(' in')]
    return '%s: %s' % (place, text)

@contextmanager
def written_meanwhile(host, texts):
    """Inside a `with`, files with these texts are there. texts: {path: text}"""
    try:
        for path in sorted(texts):
            with open(host.path(path), 'wb') as target:
                target.write(to_bytes(texts[path]))
        yield
    finally:
        for path in texts:
            remove_file(host.path(path))

class Nginx(object):
    """nginx: its files, and its processes. What it found out of them it keeps."""
    def __init__(self, host):
        self.host = host
        self.known_version = None
        self.version_asked = None   # a command that was begun to find it out
        self.parsed = {}            # {(path, text): ProxyFile} of what was read before
        self.passed = set()         # what `nginx -t` found nothing against

    # What it has

    def version(self):
        """Its version, as a tuple."""
        if self.known_version is None:
            asked = self.version_asked
            if asked and asked.result().status == 0:
                result = asked.result()
            else:
                result = self.host.ask(['nginx', '-v'])
            self.known_version = tuple(map(int, re.findall(r'\d+', result.err)[:3]))
        return self.known_version

    @contextmanager
    def asking_version(self):
        """It is asked for its version beside what is done inside the `with`, so that who
        wants it there does not wait. What wants none, as a worker, needs no nginx."""
        with self.host.begin(['nginx', '-v']) as self.version_asked:
            try:
                yield
            finally:
                self.version_asked = None

    def files(self):
        """{path: ProxyFile} of conf.d and sites-enabled, without our catch-all."""
        host = self.host
        read = {}
        for folder, ending in ((PROXIES, '.conf'), (NGINX + '/sites-enabled', '')):
            for name in list_folder(host.path(folder)):
                path = folder + '/' + name
                is_read = name.endswith(ending) and path != CATCH_ALL
                if not is_read or not os.path.isfile(host.path(path)):
                    continue

                read[path] = self.parse(path, host.text(path))
        return read

    def mend_certificates(self, problem):
        """Have no file in conf.d name a certificate that nginx cannot load: it would
        refuse whatever is changed of another app. True where there was one. The host's
        lock is held. problem: what nginx said; where that is of a certificate, it is
        asked again: only what it says of what lies there counts, not of a file that is
        tried"""
        if not refused_certificate(problem):
            return False

        mended = False
        path = refused_certificate(self.problem())
        while path and self.go_on_without(path):
            mended = True
            path = refused_certificate(self.problem())
        return mended

    def go_on_without(self, lost):
        """Set a certificate aside, where it is there, and write what names it in conf.d
        anew; False where nothing of ours does. lost: its path"""
        host = self.host
        if host.certificates.is_there(lost):
            step('https: nginx cannot load %s: it is %s.broken now', lost, lost)
            os.rename(host.path(lost), host.path(lost + '.broken'))

        is_named = False
        for path in sorted(self.files()):
            text = host.text(path)
            alone = without_https(text)
            if lost not in text or alone == text:
                continue

            is_named = True
            app = app_of_file(path)
            step('https: %s is lost: installing the proxy file of %s without', lost, app)
            replace_file(host.path(path), self.form(app, alone))
        replace_file(host.path(CATCH_ALL), self.catch_all_text(self.files()))
        return is_named

    def parse(self, path, text):
        """The ProxyFile of a text at a path. A push asks several times: what has not
        changed is not parsed again."""
        if (path, text) not in self.parsed:
            self.parsed[path, text] = read_proxy_file(text, path)
        return self.parsed[path, text]

    def main_directives(self):
        """What nginx.conf itself says in its http block, as [Directive]."""
        for directive in NginxReader(self.host.text(NGINX, 'nginx.conf')).directives:
            if directive.words == ['http']:
                return directive.inside or []
        return []

    def catch_all_text(self, files):
        """What 000-dockhand.conf is to hold beside these files, {path: ProxyFile}."""
        return render_catch_all(all_servers(files), self.version(), has_ipv6(self.host),
                                self.token(), self.host.certificates.are_any())

    def token(self):
        """What nginx here says at TOKEN_PATH; '' before it was installed."""
        return self.host.text(TOKEN_FILE).strip()

    # What an app's file may say beside them

    def check(self, release, files, older, known, is_tested_later=False):
        """Failure where a release's proxy file clashes with another, or nginx refuses it.
        files: {path: ProxyFile}; older: whether it was live before, so that a rule which
        is newer only warns; known: the apps that the asker may know of, None for all;
        is_tested_later: whether nginx is asked another time"""
        with telling_of_file(release):
            self.check_rules(release, files, older, known)
            if not is_tested_later:
                self.check_text(release, files, known)

    def has(self, release):
        """Whether the proxy file of a release lies there already, as it would be
        installed."""
        there = self.host.text(proxy_path(release.app))
        return there == self.form(release.app, release.proxy)

    def check_rules(self, release, files, older, known):
        """Failure where it clashes with another; nginx itself is not asked."""
        own = proxy_path(release.app)
        check_not_foreign(self.host, own, release.app)
        others = dict(files)
        others.pop(own, None)
        pushed = read_proxy_file(pushed_part(release))

        for problem in self.rules_broken(release, pushed, others, known):
            if not older:
                raise Failure(problem)
            step('Note: %s; the next push will be refused for it',
                 told_of_file(release, problem))
        check_proxy(pushed.servers, all_servers(others), known)
        self.check_named_files(pushed.directives)

    def check_text(self, release, files, known):
        """Failure where nginx refuses it."""
        problem = self.test(release.app, pushed_part(release), files)
        if self.mend_certificates(problem):
            files.update(self.files())
            problem = self.test(release.app, pushed_part(release), files)
        if not problem:
            return

        before = self.problem()
        refuse_if(before, "nginx's configuration was broken before this push: %s",
                  unquoted(before, known))
        refuse_if(re.match(r'/\S+\.conf:\d+: ', problem), 'nginx-proxy.conf clashes with '
                  'another file: %s', unquoted(problem, known))
        if not problem.startswith('nginx-proxy.conf:'):
            problem = 'nginx-proxy.conf: ' + problem
        raise Failure('%s', problem)

    def rules_broken(self, release, pushed, others, known):
        """What a proxy file says that reaches other apps although nginx takes it, each as
        `FILE:LINE: what, and what to do`. pushed: its ProxyFile; others:
        {path: ProxyFile}; known: as check wants it"""
        for line, text in pushed.troubles:
            yield 'nginx-proxy.conf:%d: %s' % (line, text)

        if not is_made(release):            # what we make keeps to its own server
            trees = [(path, others[path].directives) for path in sorted(others)]
            trees.append((NGINX + '/nginx.conf', self.main_directives()))
            for directive, text in rule_problems(release.app, pushed.directives, trees,
                                                 self.version(), known):
                shown = printable(' '.join(directive.words[:2]), 60)
                yield 'nginx-proxy.conf:%d: `%s`: %s' % (directive.line, shown, text)

        own = proxy_path(release.app)
        theirs = [claim for path in sorted(others)
                  for claim in claims_of(others[path].servers, path)]
        taken = taken_name(claims_of(pushed.servers, own), theirs, known,
                           names_of_config(release))
        if taken:
            yield taken

    def check_named_files(self, directives):
        """Failure where a certificate is something that nginx might read for ever."""
        for directive in all_directives(directives):
            name = directive.words[0]
            if '_certificate' not in name and name != 'ssl_dhparam':
                continue

            for word in directive.words[1:]:
                path = self.host.path(os.path.join(NGINX, word))
                refuse_if(os.path.exists(path) and not os.path.isfile(path),
                          'nginx-proxy.conf:%d: %s is no file', directive.line,
                          printable(word))

    def check_alone(self, release, files):
        """Failure where a proxy file leans on what the file of another app defines: that
        app could not be changed or removed any more."""
        alone = {}
        for path in files:
            app = app_of_file(path)
            is_others = app not in (None, release.app)
            if not is_others or not is_ours(self.host.text(path), app):
                alone[path] = files[path]
        if len(alone) == len(files):
            return
        problem = self.test(release.app, pushed_part(release), alone)
        refuse_if(problem, "%s (it must not lean on another app's file)", problem)

    def test(self, app, text, files):
        """What nginx says against a proxy file in the place of the app's own, or ''.
        files: {path: ProxyFile}"""
        with self.staged(app, text, files) as (argv, judge):
            return judge(self.host.ask(argv)) if argv else ''

    @contextmanager
    def testing(self, release):
        """The file with which a release is going to be installed is tested beside what is
        done inside the `with`. Should nginx say anything against it, `install` hears it
        too, which asks again then."""
        if not release.proxy:
            yield
            return

        form = self.form(release.app, release.proxy)
        text = pushed_part(release) if form == release.proxy else form
        with self.staged(release.app, text, self.files()) as (argv, judge):
            if not argv:
                yield
                return
            with self.host.begin(argv) as tested:
                yield
                judge(tested.result())

    @contextmanager
    def staged(self, app, text, files):
        """Inside a `with`, a copy of nginx's files with this one in the place of the
        app's own: what lies in conf.d is valid at every moment. Gives the command that
        tests it, and a function of its Result: what nginx says against it, or ''. The
        command is None where it said nothing before, and nothing has changed."""
        host = self.host
        own = proxy_path(app)
        whole = NGINX + '/nginx.conf'
        candidate = temporary_of(own + TRIAL)
        copy = temporary_of(NGINX + '/%s.conf' % app)

        parsed = self.parse(own, text)
        files = dict(files, **{own: parsed})
        paths = [path for path in sorted(files) if path.startswith(PROXIES)]
        paths[paths.index(own)] = candidate
        conf = stage_nginx_conf(host.text(whole), self.catch_all_text(files), paths)
        asked = (text, conf) + tuple(id(files[path]) for path in sorted(files))
        if asked in self.passed:            # a text is parsed once: see `parse`
            yield None, None
            return

        def judge(result):
            said = problem_of(result).replace(copy, whole)
            if not said:
                self.passed.add(asked)
            return said.replace(candidate, 'nginx-proxy.conf')

        new = [path for path in files_made(parsed.directives)
               if not os.path.lexists(host.path(path))]
        try:
            with written_meanwhile(host, {candidate: text, copy: conf}):
                yield NGINX_TEST + ('-c', copy), judge
        finally:
            for path in new:
                remove_if_empty(host.path(path))

    def problem(self):
        """What nginx says against what lies there now, or ''."""
        return problem_of(self.host.ask(NGINX_TEST))

    # Its files change

    def install(self, release, older, known):
        """Put a release's proxy file in place, or take the app's away where it has none,
        and make nginx follow. older, known: as check wants them"""
        app = release.app
        with host_lock(self.host):
            if self.has(release):
                return

            files = self.files()
            text = release.proxy
            if text:
                form = self.form(app, text)
                text = self.checked_form(release, form, files, older, known)
            neighbour = self.answering_neighbour(app, files)
            if self.write(app, text, files):
                self.reload(is_tested=bool(text))
                self.check_neighbour(neighbour)

    def checked_form(self, release, form, files, older, known):
        """The form in which a release's proxy file is installed; Failure as check has
        it. form: the one with https"""
        with telling_of_file(release):
            self.check_rules(release, files, older, known)
            text = self.usable_form(release.app, release.proxy, form, files)
            if text == release.proxy:           # with https nginx has said yes already
                self.check_text(release, files, known)
        return text

    def form(self, app, text):
        """An app's proxy file with what https adds to it now."""
        return self.host.certificates.render(app, text)

    def usable_form(self, app, text, form, files):
        """A form of a proxy file with https; where nginx refuses the file only with that,
        the file alone: no certificate, and nothing that we add, keeps an app from being
        served."""
        if form == text:
            return text

        problem = self.form_problem(app, form, files)
        if self.mend_certificates(problem):
            files.update(self.files())
            form = self.form(app, text)
            problem = self.form_problem(app, form, files)
        if problem:
            step('https: nginx refuses the proxy file of %s with it, which goes on '
                 'without: %s', app, problem)
            return text
        return form

    def form_problem(self, app, form, files):
        """What nginx says against an app's proxy file with https, and the line it means;
        or ''."""
        problem = self.test(app, form, files)
        named = re.match(r'nginx-proxy\.conf:(\d+): ', problem)
        if not named:
            return problem
        line = form.split('\n')[int(named.group(1)) - 1].strip()
        return '%s (`%s`)' % (problem[named.end():], printable(line))

    def restore(self, app, text):
        """Put the text back that was live before, or take the file away: it is not
        checked again, and nginx reloads whatever lies there."""
        with host_lock(self.host):
            files = self.files()
            form = self.usable_form(app, text, self.form(app, text), files)
            self.write(app, form, files)
            self.reload()

    def refresh(self):
        """Bring our catch-all up to date, and have nginx take up all that lies there."""
        with host_lock(self.host):
            replace_file(self.host.path(CATCH_ALL), self.catch_all_text(self.files()))
            self.reload()

    def remove(self, app):
        """Take an app's proxy file away for good."""
        with host_lock(self.host):
            if self.write(app, '', self.files()):
                self.reload()

    def remove_unused_logs(self, before, after):
        """Remove what is empty of the logs that an app's file names no more: a switch
        that is undone leaves none. before: ProxyFile; after: it too, or None"""
        unused = set(files_made(before.directives))
        if after is not None:
            unused.difference_update(files_made(after.directives))
        for path in sorted(unused):
            remove_if_empty(self.host.path(path))

    def remove_logs(self, releases):
        """Remove the logs that the files of an app's releases name, with what logrotate
        has made of them; but those stay that a file which is there names too."""
        named = set()
        for release in releases:
            file = self.parse(proxy_path(release.app), release.proxy or '')
            named.update(files_made(file.directives))
        for file in self.files().values():
            named.difference_update(files_made(file.directives))

        for path in sorted(named):
            folder, own = os.path.split(path)
            if folder != NGINX_LOGS:
                continue
            for name in list_folder(self.host.path(folder)):
                if re.match(re.escape(own) + ROTATED, name):
                    remove_file(self.host.path(folder, name))

    def write(self, app, text, files):
        """Write an app's proxy file, or remove it if it is ours, and the catch-all that
        goes with it; True where something changed.
        files: {path: ProxyFile}, brought up to date"""
        own = proxy_path(app)
        path = self.host.path(own)
        before = files.get(own)
        if text:
            changed = replace_file(path, text)
            files[own] = self.parse(own, text)
        else:
            changed = is_ours(read_file(path), app) and remove_file(path)
            if changed:
                files.pop(own, None)
        if changed and before is not None:
            self.remove_unused_logs(before, files.get(own))

        others = replace_file(self.host.path(CATCH_ALL), self.catch_all_text(files))
        return others or changed

    # Another app is asked before and after

    def answering_neighbour(self, app, files):
        """The Neighbour of another app that answers through nginx now, or None; of the
        first three that have a name and a port of nginx's."""
        asked = 0
        for path in sorted(files):
            other = app_of_file(path)
            if other in (None, app) or not is_ours(self.host.text(path), other):
                continue
            place = plain_place(files[path].servers)
            if place is None:
                continue
            if asked == 3:
                return None

            asked += 1
            name, port = place
            status = fetch_status(self.host, name, port, 1)
            if status.isdigit() and status not in NO_ANSWERS:
                return Neighbour(other, name, port, status)
        return None

    def check_neighbour(self, neighbour):
        """Failure where an app answered before a reload, and three times not since."""
        if neighbour is None:
            return
        for _ in range(3):
            status = fetch_status(self.host, neighbour.name, neighbour.port, 2)
            if status.isdigit() and status not in NO_ANSWERS:
                return
            self.host.clock.sleep(0.1)

        raise Failure('with this proxy file another app answers %s instead of %s: what '
                      'in it holds for more than its own server?', status,
                      neighbour.status)

    # Its processes

    def reload(self, is_tested=False):
        """Make nginx take up its configuration; Failure unless it really has. Where a
        port is taken, `nginx -t` and the reload both succeed, but the earlier workers go
        on.
        is_tested: whether nginx has said yes to it. `nginx -s reload` would read all of
        it once more before it sends the master this signal; where that has no effect, it
        says why"""
        host = self.host
        master = self.master()
        if master is None:
            return self.start()
        earlier = self.workers(master)
        if is_tested:
            host.signal(master, signal.SIGHUP)
            followed = self.is_followed(earlier, SIGNAL_TIMEOUT)
            if followed and self.master() == master:    # or it has ended meanwhile
                return

        self.order_reload()
        if not self.is_followed(earlier, RELOAD_TIMEOUT):
            raise Failure('nginx keeps its old configuration: ' + self.complaint())

    def is_followed(self, earlier, patience):
        """Whether none of some workers, [process id], takes requests any more, within so
        many seconds."""
        host = self.host
        deadline = host.clock.monotonic() + patience
        while any(is_working(host.text('/proc', pid, 'cmdline')) for pid in earlier):
            if host.clock.monotonic() > deadline:
                return False
            host.clock.sleep(0.01)
        return True

    def order_reload(self):
        """Tell nginx to take up its configuration; Failure where it refuses it."""
        argv = ['nginx', '-s', 'reload']
        try:
            self.host.run(argv)
        except Failure as problem:
            if not self.mend_certificates(str(problem)):
                raise
            self.host.run(argv)

    def start(self, wait=True):
        """Start nginx by whatever init is there. While systemd boots it does that itself,
        once `recover` has ended. wait: not in `recover`, for which nginx may wait."""
        host = self.host
        self.end_orphans()
        argv = ['service', 'nginx', 'start']
        if is_systemd(host):
            state = host.ask(['systemctl', 'is-system-running']).out.strip()
            if state == 'starting':
                return
            if not wait:
                argv = ['systemctl', '--no-block', 'start', 'nginx']
        if host.ask(argv).status == 0:
            return

        # Upstart refuses to start a job that it is starting itself, after a crash
        deadline = host.clock.monotonic() + RELOAD_TIMEOUT
        while self.master() is None:
            if host.clock.monotonic() > deadline:
                raise Failure('nginx does not start: ' + self.complaint())
            host.clock.sleep(0.1)

    def end_orphans(self):
        """End the workers of a master that was killed, where init has not: they hold the
        ports. They finish what they were asked."""
        host = self.host
        orphans = [pid for pid, title in children(host, '1').items()
                   if title.startswith('nginx: worker')]
        for pid in orphans:
            send_signal(pid, signal.SIGQUIT)

        deadline = host.clock.monotonic() + RELOAD_TIMEOUT
        while any(is_working(host.text('/proc', pid, 'cmdline')) for pid in orphans):
            if host.clock.monotonic() > deadline:
                return
            host.clock.sleep(0.01)

    def complaint(self):
        """The last thing that it complained of in its own log."""
        path = NGINX_LOGS + '/error.log'
        lines = re.findall(r'.*\[(?:emerg|alert)\].*', self.host.text(path))
        return plain_line(lines[-1]) if lines else 'see ' + path

    def master(self):
        """The process id of the master, None where it does not run."""
        conf = self.host.text(NGINX, 'nginx.conf')
        named = re.findall(r'(?m)^\s*pid\s+([^;]+);', conf)[:1]
        for path in named + ['/run/nginx.pid']:
            pid = self.host.text(path).strip()
            if pid.isdigit() and 'nginx' in self.host.text('/proc', pid, 'cmdline'):
                return pid
        return None

    def workers(self, master):
        """The process ids of the workers that still take requests."""
        titles = children(self.host, master)
        return [pid for pid in titles if is_working(titles[pid])]

    def drain(self, places):
        """Wait, DRAIN seconds at most, until no request can reach some places any more.
        places: [(address, port)]"""
        clock = self.host.clock
        deadline = clock.monotonic() + DRAIN
        while not self.is_drained(places) and clock.monotonic() < deadline:
            clock.sleep(0.1)

    def is_drained(self, places):
        """Whether each worker that is shutting down has no connection to some places, and
        no more clients than connections to apps: one more may be about to connect
        there."""
        left = set((address, str(port)) for address, port in places)
        sockets = read_sockets(self.host.run(['ss', '-tanp']))
        ports = [socket.port for socket in sockets if socket.state == 'LISTEN']
        for pid, title in children(self.host, self.master()).items():
            if 'shutting' not in title:
                continue

            held = [socket for socket in sockets if pid in socket.pids]
            clients = [socket for socket in held if socket.port in ports]
            to_apps = len(held) - len(clients)
            if len(clients) > to_apps:
                return False
            if any(socket.peer in left for socket in held):
                return False
        return True

# ---- Certificates ----------------------------------------------------------------------
# For https: the files that nginx reads, which are ours, and certbot, who gets and renews
# what is in them. nginx never reads certbot's own: where certbot is removed, or one of
# its certificates, nginx would not start any more, and every site be down.

LINEAGE = 'dockhand-'           # how certbot calls what we order, before the host name
OTHER_CERTBOT = 'Another instance of Certbot is already running'
NO_TIME = 'certbot did not come to its end in time'
NO_TIME_LEFT = 'there was no time left for it: other names took too long'
NOT_YET = ('an app that takes all names answers to it now: it is got with the first '
           'push')
NO_CERTBOT = 'certbot is missing: apt-get install certbot'
OLD_HOST = ('the certbots of Ubuntu 12.04 and 14.04 speak a protocol that is gone: bring '
            'a certificate, with `dockhand https APP --cert`')

def is_whole_pem(text):
    """Whether a text may be a certificate and its key."""
    return '-----BEGIN CERTIFICATE-----' in text and ' KEY-----' in text

class Certificates(object):
    """The certificates of a server. What openssl said of a file is kept."""
    def __init__(self, host):
        self.host = host
        self.known = {}             # {text of a file: its X509, or None}

    # What nginx has

    def path(self, name):
        """The file for a host name, with its chain and key."""
        return '%s/%s.pem' % (CERTIFICATES, name)

    def own_path(self, app):
        """The file that somebody brought for an app."""
        return '%s/%s.pem' % (OWN_CERTIFICATES, app)

    def are_any(self):
        """Whether any app has, or had, https."""
        return os.path.isdir(self.host.path(CERTIFICATES))

    def are_renewed(self):
        """Whether certbot has a certificate that was ordered here."""
        names = list_folder(self.host.path(CERTBOT, 'renewal'))
        return any(name.startswith(LINEAGE) for name in names)

    def is_on(self, app):
        """Whether an app is to have https."""
        return os.path.exists(self.host.path(STATE, 'apps', app, 'https'))

    def is_there(self, path):
        """Whether nginx can read a file: a power cut, or a person, may have taken it."""
        return is_whole_pem(self.host.text(path))

    def own(self, app):
        """The Certificate that somebody brought for an app, or None."""
        path = self.own_path(app)
        if not self.is_there(path):
            return None
        x509 = self.read(path)
        return Certificate(path, x509.names) if x509 else None

    def of(self, app, names):
        """[Certificate] that are there for an app's names; one that somebody brought wins
        over certbot's."""
        own = self.own(app)
        found = [own] if own else []
        return found + [Certificate(self.path(name), [name]) for name in names
                        if self.is_there(self.path(name))]

    def uses(self, app, text):
        """What each certificate that is there is used for in an app's proxy file:
        [(Certificate, [server name])]."""
        names = plain_names(text or '')
        return uses_of(names, self.of(app, names_for_https(text or '')))

    def secured(self, app, text):
        """The full names of an app's proxy file that it has https for: nginx may have
        refused the file with a certificate that is there."""
        if not self.is_on(app):
            return []

        installed = self.host.text(proxy_path(app))
        found = []
        for certificate, names in self.uses(app, text):
            if certificate.path in installed:
                found += [name for name in names if is_full_name(name)]
        return found

    def render(self, app, text):
        """What conf.d is to hold of an app's proxy file, with the certificates that are
        there now. Where https is off again, what certbot has is renewed all the same."""
        if not text or not self.are_any():
            return text
        version = self.host.nginx.version()
        if self.is_on(app):
            certificates = self.of(app, names_for_https(text))
            return with_https(text, certificates, version)

        # (Most texts name none of them, and need not be read for that.)
        ordered = [name[:-len('.pem')] for name in
                   list_folder(self.host.path(CERTIFICATES)) if name.endswith('.pem')]
        named = [name for name in ordered if name in text]
        if named and set(named) & set(names_for_https(text)):
            return with_https(text, [], version)
        return text

    def read(self, path):
        """The X509 of the first certificate in a file, or None."""
        text = self.host.text(path)
        if text not in self.known:
            self.known[text] = read_x509(self.openssl(
                path, 'x509', '-noout', '-issuer', '-dates', '-text'))
        return self.known[text]

    def openssl(self, path, *words):
        """What openssl prints of a file, '' where it cannot read it."""
        argv = ('openssl', words[0], '-in', self.host.path(path)) + words[1:]
        try:
            return self.host.ask(argv).out
        except Failure:             # it is not here: no reason to refuse a push
            return ''

    def days_left(self, x509):
        return int((x509.ends - self.host.clock.time()) // 86400)

    def is_late(self, name):
        """Whether less than a quarter of its time is left: certbot renews before that."""
        x509 = self.read(self.path(name))
        if x509 is None:
            return True
        left = x509.ends - self.host.clock.time()
        return left < (x509.ends - x509.begins) / 4.0

    def keep(self, path, text):
        """Put a certificate and its key where nginx reads them; Failure where they do not
        belong together. True if that changed anything."""
        make_folder(self.host.path(CERTIFICATES), 0o700)
        make_folder(os.path.dirname(self.host.path(path)), 0o700)
        return replace_file(self.host.path(path), text, 0o600, self.check_pair)

    def check_pair(self, path):
        """Failure where a file's key is not that of its first certificate."""
        of_key = self.host.ask(['openssl', 'pkey', '-in', path, '-pubout']).out
        argv = ['openssl', 'x509', '-in', path, '-noout', '-pubkey']
        refuse_if(not of_key or of_key != self.host.ask(argv).out,
                  'the key does not belong to the certificate')

    # Why there is none

    def failed_path(self, name):
        return self.host.path(CERTIFICATES, name + '.failed')

    def note(self, name, why, was_asked):
        """Write down why a name has no certificate, and when that was found out.
        was_asked: whether the authority was: it counts how often it says no"""
        make_folder(self.host.path(CERTIFICATES), 0o700)
        told = {'time': round(self.host.clock.time(), 2), 'why': why, 'asked': was_asked}
        replace_file(self.failed_path(name), to_json(told), 0o600)

    def noted(self, name):
        """{'time', 'why', 'asked'} of what was noted, or {}, also where a person has
        written something else there."""
        try:
            noted = read_json(self.failed_path(name))
        except ValueError:
            return {}
        is_whole = isinstance(noted, dict) and set(noted) >= set(['time', 'why', 'asked'])
        return noted if is_whole else {}

    def is_refused_lately(self, name):
        """Whether the authority said no a moment ago: after five times in an hour it says
        nothing else any more."""
        noted = self.noted(name)
        is_recent = noted.get('time', 0) > self.host.clock.time() - ORDER_AGAIN
        return bool(noted.get('asked')) and is_recent

    # Certbot

    def has_certbot(self):
        return bool(self.host.ask(['which', 'certbot']).out)

    def no_certbot_text(self):
        """What to do where there is none."""
        return OLD_HOST if is_upstart(self.host) else NO_CERTBOT

    def lineage_files(self, name):
        """What certbot has for a name: its chain and its key."""
        folder = self.host.path(CERTBOT, 'live', LINEAGE + name)
        return [os.path.join(folder, file) for file in ('fullchain.pem', 'privkey.pem')]

    def renewal_conf(self, name):
        """Where certbot says how it renews the certificate for a name."""
        return self.host.path(CERTBOT, 'renewal', LINEAGE + name + '.conf')

    def is_renewed(self, name):
        """Whether certbot has a certificate for a name, which it renews."""
        has_files = all(map(os.path.exists, self.lineage_files(name)))
        return has_files and bool(read_file(self.renewal_conf(name)))

    def is_newest(self, name):
        """Whether nginx has what certbot has: one that is killed before it runs its hook
        never runs it for that certificate."""
        chain = read_file(self.lineage_files(name)[0])
        return not chain or self.host.text(self.path(name)).startswith(chain)

    def is_settled(self, name):
        """Whether nginx has a certificate for a name, and certbot renews it."""
        is_there = self.is_there(self.path(name))
        return is_there and self.is_renewed(name) and self.is_newest(name)

    def copy(self, name):
        """Take over what certbot has for a name; False where it has nothing, or is just
        changing it, or was killed at that."""
        if not self.is_renewed(name):
            return False

        text = ''.join(read_file(path) or '' for path in self.lineage_files(name))
        try:
            self.keep(self.path(name), text)
        except Failure:
            return False
        return is_whole_pem(text)

    def order(self, name, deadline):
        """Have certbot get a certificate for a name, and take it over; why not, or None.
        (Said like this, how goes before what its cli.ini says for others; `--webroot`
        clashes with that.) deadline: a moment of the clock"""
        make_folder(self.host.path(CHALLENGES))
        self.write_hook()
        if not read_file(self.renewal_conf(name)):      # else certbot mends it itself
            self.remove_remains(name)

        result = self.certbot(
            deadline, 'certonly', '--authenticator', 'webroot', '-w', CHALLENGES,
            '--preferred-challenges', 'http', '-d', name, '--cert-name', LINEAGE + name,
            '--keep-until-expiring', '--agree-tos', '--register-unsafely-without-email')
        if result.status == OUT_OF_TIME:
            return NO_TIME
        if result.status:
            return certbot_reason(result.out + '\n' + result.err)
        if not self.copy(name):
            return 'certbot says that it has got one, and there is none: see %s' % CERTBOT
        remove_file(self.failed_path(name))
        return None

    def write_hook(self):
        """What certbot runs for each certificate that it has renewed."""
        hook = self.host.path(RENEWAL_HOOK)
        if not os.path.isdir(os.path.dirname(hook)):
            os.makedirs(os.path.dirname(hook))
        replace_file(hook, RENEWAL_HOOK_TEXT, 0o755)

    def certbot(self, deadline, *words):
        """Run certbot until a deadline; its Result, or one of status 124. Another one,
        which renews or was begun by hand, is waited for; each try leaves a folder in
        /tmp."""
        clock = self.host.clock
        is_told = False
        while True:
            left = int(deadline - clock.monotonic())
            if left <= 0:
                return Result(124, '', '')
            argv = ('timeout', '-k', '9', str(left), 'certbot') + words + ('-n',)
            result = self.host.ask(argv)
            if OTHER_CERTBOT not in result.err + result.out:
                return result

            if not is_told:
                detail('another certbot is running: waiting for it')
                is_told = True
            clock.sleep(5)

    def remove_remains(self, name):
        """Remove what a certbot that was killed has left of a first order: it would call
        the next one by another name."""
        remains = [self.renewal_conf(name)]
        remains += [self.host.path(CERTBOT, folder, LINEAGE + name)
                    for folder in ('live', 'archive')]
        if any(os.path.lexists(path) for path in remains):
            self.host.run(['rm', '-rf', '--'] + remains)

    def has_certificate(self, name):
        """Whether there is a certificate for a name, in use or to be renewed."""
        return (os.path.lexists(self.host.path(self.path(name)))
                or os.path.lexists(self.renewal_conf(name)))

    def has_anything(self, name):
        """Whether there is anything for a name that would have to go with it."""
        return self.has_certificate(name) or os.path.lexists(self.failed_path(name))

    def give_back(self, name):
        """Remove all that there is for a name; Failure where certbot cannot now."""
        if self.is_renewed(name) and self.has_certbot():
            deadline = self.host.clock.monotonic() + 60
            result = self.certbot(deadline, 'delete', '--cert-name', LINEAGE + name)
            refuse_if(result.status, '%s; later: certbot delete --cert-name %s',
                      certbot_reason(result.out + '\n' + result.err), LINEAGE + name)

        self.remove_remains(name)
        for path in (self.host.path(self.path(name)), self.failed_path(name)):
            remove_file(temporary_of(path))
            remove_file(path + '.broken')
            remove_file(path)

# ---- An app: its folder, releases, repository ------------------------------------------
# What the store and the repository have of an app. Nothing here starts or stops one.

def list_apps(host):
    """The names of the apps that have anything in the store, in their order."""
    return list_folder(host.path(STATE, 'apps'))

def all_apps(host):
    """The names of all apps that have a release, a config or a repository here."""
    names = set(list_apps(host))
    for folder in list_folder(host.path(host.home())):
        name = folder[:-len('.git')]
        if folder.endswith('.git') and is_app_name(name):
            names.add(name)
    return sorted(names)

def seen_apps(host):
    """Those of all_apps that whoever asks may know of."""
    reach = host.reach()
    return [name for name in all_apps(host) if reach is None or name in reach]

HELD_REF = 'refs/dockhand/%d'   # not advertised; git keeps what one can go back to

class App(object):
    """An app of this server: what lies of it in the store, and its repository.
    known: the apps that whoever asks may know of, as a Reach or a KeysReach; None for
    all"""
    def __init__(self, host, name, known=None):
        self.host = host
        self.name = name
        self.known = known
        self.docker = host.docker
        self.nginx = host.nginx

    # Where its things are

    def folder(self, *parts):
        return self.host.path(STATE, 'apps', self.name, *parts)

    def release_folder(self, number):
        return self.folder('releases', str(number))

    def repository(self):
        return self.host.path(self.host.home(), self.name + '.git')

    def build_folder(self):
        return self.host.path(STATE, 'build', self.name)

    def held_for(self):
        """What a push or a command holds its lock for at this moment, in words, or ''."""
        return held_for(self.host.path(LOCKS, self.name))

    def empty_build_folder(self):
        """As the git user. Where there is none any more root may: rm follows no link."""
        folder = self.build_folder()
        if os.path.lexists(folder):
            self.host.run(['rm', '-rf', '--', folder], account=self.host.account())

    # Its config

    def config(self):
        """{key: value} of what the host knows about it and its repository does not."""
        return read_config(read_json(self.folder('config')))

    def save_config(self, config):
        make_folder(self.folder(), 0o700)
        path = self.folder('config')
        if config:
            replace_file(path, to_json(config_record(config)), 0o600)
        else:
            remove_file(path)

    # Its releases

    def numbers(self):
        """The numbers of its releases, failed ones included, as [int] from the first."""
        names = list_folder(self.folder('releases'))
        return sorted(int(name) for name in names if name.isdigit())

    def load(self, number):
        """A Release from the store."""
        folder = self.release_folder(number)
        record = dict({'config': {}, 'layers': []}, **read_json(folder + '/release.json'))
        record['config'] = read_config(record['config'])
        if is_finished_older(record) and self.linked_number('pending') != number:
            record['seconds'] = 0
        if 'key' in record:             # older versions wrote down only whose push it was
            record.update(by=record['key'], how='push')
            if record.get('failed') and record.get('image'):    # the last layer, there
                record.update(layers=[record['image']])
        if record.get('address'):       # and knew of one alone
            record.update(addresses=[record['address']])
        record.update(app=self.name, number=number, plan=False,
                      job=read_file(folder + '/upstart.conf'),
                      proxy=read_file(folder + '/nginx-proxy.conf'))

        fields = dict((field, record.get(field)) for field in Release._fields)
        if fields['image']:                 # it was built: nothing is unknown any more
            for field, nothing in NOTHING.items():
                fields[field] = fields[field] or nothing
        return Release(**fields)

    def save(self, release):
        """Write a release down whole: its record comes last."""
        folder = self.release_folder(release.number)
        make_folder(self.folder(), 0o700)
        make_folder(folder)

        texts = {'upstart.conf': release.job, 'nginx-proxy.conf': release.proxy}
        for name in sorted(texts):
            write_or_remove(os.path.join(folder, name), texts[name] or None)
        env = None if release.failed else environment_text(release)
        write_or_remove(folder + '/env', env)
        self.save_record(release)

    def save_record(self, release):
        """Write down what is known of a release, but for its files."""
        record = dict(release._asdict(), config=config_record(release.config))
        for field in ('plan', 'job', 'proxy', 'part'):
            del record[field]
        folder = self.release_folder(release.number)
        replace_file(folder + '/release.json', to_json(record), 0o600)

    def kept(self):
        """The releases that one can go back to, the live one first, then the one that was
        live before. Where a crash came between a turn and its link, the link is right."""
        live = self.linked_number('live')
        releases = [self.load(number) for number in self.numbers()]
        finished = [release for release in releases if release.seconds is not None]
        return sorted(finished, reverse=True, key=lambda release: (
            release.number == live, release.turn or 0, release.number))

    def count_turn(self, old, new):
        """Write down that a release becomes live now, after all others; gives it so."""
        turns = [release.turn or 0 for release in self.kept()]
        turn = 1 + max([0] + turns)
        if old is not None and old.turn is None:    # an older version did not count
            self.save_record(old._replace(turn=turn))
            turn += 1
        new = new._replace(turn=turn)
        self.save_record(new)
        return new

    # What is live, and what is being switched to

    def linked_number(self, link):
        """The number of the release that `live` or `pending` points to, or None. (Where
        there is no such link, what is resolved is its own name.)"""
        name = os.path.basename(os.path.realpath(self.folder(link)))
        return int(name) if name.isdigit() else None

    def linked(self, link):
        """The Release that `live` or `pending` points to, or None."""
        number = self.linked_number(link)
        if number is None:
            return None
        release = self.load(number)
        return release if release.commit else None

    def live(self):
        """The Release that is live, or None."""
        return self.linked('live')

    def must_be_live(self):
        """The Release that is live, or Failure."""
        check_app_name(self.name)
        live = self.live()
        refuse_if(live is None, 'no app %s is live here: see dockhand apps', self.name)
        return live

    def set_link(self, link, release):
        replace_link(self.folder(link), 'releases/%d' % release.number)

    def is_stopped(self):
        """Whether a person said `dockhand stop`; it lasts until a start, or until `apply`
        makes any release live."""
        return os.path.exists(self.folder('stopped'))

    def wanted_proxy(self, release):
        """A release's proxy file as its app is to be served now, without https."""
        if self.is_stopped():
            return self.proxy_when_stopped(release)
        return release.proxy

    def proxy_when_stopped(self, release):
        """What it is to hold while the app is stopped. A file that was pushed stays as it
        is: it may do more than pass requests on, and says itself (`error_page`) what is
        answered where the app does not."""
        if not is_made(release):
            return release.proxy
        return closed_proxy(release.proxy, self.nginx.version())

    def is_waiting(self):
        """Whether it has something here, but was never live."""
        if not is_app_name(self.name) or self.name not in all_apps(self.host):
            return False
        return self.live() is None

    def waiting_text(self):
        """What it waits for, which was never live."""
        numbers = self.numbers()
        if not numbers:
            return 'for its first push'
        why = self.load(numbers[-1]).failed or 'under way'
        return 'for a push that succeeds; the last one: ' + why

    # Its repository

    def git(self, *args, **options):
        """Run git in the repository, as the git user only; what it prints. act: host.ask
        for a Result instead, where git may fail"""
        argv = ['git', '--git-dir=' + self.repository()] + list(args)
        act = options.get('act', self.host.run)
        return act(argv, account=self.host.git_account())

    def remove_git_file(self, name):
        """Remove a file of the repository, if it is there."""
        path = os.path.join(self.repository(), name)
        if os.path.lexists(path):
            self.host.as_git(remove_file, path)

    def read_branch(self, ref):
        """The commit of a branch, '' where there is none."""
        return self.git('for-each-ref', '--format=%(objectname)', ref).strip()

    def is_ancestor(self, commit, of):
        """Whether a commit is part of the history of another. (git 1.7 does not know
        `merge-base --is-ancestor`.)"""
        base = self.git('merge-base', commit, of, act=self.host.ask).out.strip()
        return base == commit

    def has_history(self, commit):
        """Whether git has a commit and its parents: a killed shallow push leaves it
        without, and older versions of dockhand took what is no commit."""
        kind = self.git('cat-file', '-t', commit, act=self.host.ask)
        if kind.out.strip() != 'commit':
            return False
        listed = self.git('rev-list', '--quiet', commit, act=self.host.ask)
        return listed.status == 0

def write_or_remove(path, text):
    """Replace a file of a release; None removes it."""
    remove_file(temporary_of(path))
    if text is None:
        remove_file(path)
    else:
        replace_file(path, text, 0o600)

def is_finished_older(record):
    """Whether a record is of the first versions, which wrote it after the build and never
    said how long the deploy took."""
    is_newer = 'seconds' in record or 'failed' in record
    return bool(record.get('image')) and not is_newer

def all_records(host):
    """What is written down of each release of each app, as a dict."""
    for name in list_apps(host):
        app = App(host, name)
        for number in app.numbers():
            yield read_json(app.release_folder(number) + '/release.json')

def free_port(host, number):
    """A port of all machines that no release of any app has. With each release an app
    gets another, so that one which something else has there fails one push alone.
    number: of the release"""
    taken = set(record.get('published') for record in all_records(host))
    first, last = MACHINE_PORTS
    count = last + 1 - first
    for further in range(count):
        port = first + (number + further) % count
        if port not in taken:
            return port
    raise Failure('no port from %d to %d is free on the machines', first, last)

def free_addresses(host, count):
    """Some addresses on our network that no release of any app has."""
    taken = set()
    for record in all_records(host):
        taken.add(record.get('address'))        # of an older version
        taken.update(record.get('addresses') or [])

    subnet = host.docker.subnet(sorted(filter(None, taken)))
    free = []
    for at in range(60000):
        address = '%s.%d.%d' % (subnet, at // 250, at % 250 + 2)
        if address not in taken:
            free.append(address)
        if len(free) == count:
            return free
    raise Failure('no address is free on the network of the apps')

# ---- The engines: what keeps an app running --------------------------------------------
# Docker, and Upstart where that is PID 1: two classes with the same methods, and the
# health check over both. Uses the app, docker, and "Containers described".

# What the health check looks at. alive: True, False, or None while it is still starting;
# identity changes when the app is started anew; ports: [(address, tcp port)]; check: what
# a HEALTHCHECK said last, as check_text has it; pids: [process id] of its containers;
# past: how often docker had to start it again, in words, '' if never.
State = namedtuple('State', 'alive identity ports health text check pids past')
State.__new__.__defaults__ = ('', (), '')

def container_state(container):
    """The State of a container as docker describes it, ports where they really are."""
    state = container['State']
    settings = container.get('NetworkSettings') or {}
    alive = bool(state['Running'] and not state.get('Restarting'))
    text = 'running' if alive else exit_text(state)
    past = past_text(state, container.get('RestartCount') or 0)
    identity = (container['Id'], state['StartedAt'], container.get('RestartCount'))

    health = str((state.get('Health') or {}).get('Status') or '')
    pids = [state.get('Pid')]
    if health:
        check = check_text(state['Health'])
        return State(alive, identity, [], health, text, check, pids, past)

    networks = list((settings.get('Networks') or {}).values()) + [settings]
    addresses = [str(network['IPAddress']) for network in networks
                 if network.get('IPAddress')]
    published = (container.get('HostConfig') or {}).get('PortBindings') or {}
    ports = [int(port.split('/')[0]) for port in sorted(published)
             if port.endswith('/tcp')]
    places = [(address, port) for address in addresses[:1] for port in ports]
    return State(alive, identity, places, health, text, '', pids, past)

def restart_policy(container):
    """Whether docker starts a container again by itself, in docker's word."""
    settings = container.get('HostConfig') or {}
    return str((settings.get('RestartPolicy') or {}).get('Name'))

def time_for_docker(moment):
    """A time in the one form of `docker logs --since` that every docker reads in parts of
    a second. moment: in seconds since 1970"""
    date = time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(moment))
    return '%s.%03dZ' % (date, moment % 1 * 1000)

OUT_OF_MEMORY = 'out of memory: the kernel killed it'

def exit_text(state):
    """How a container ended. state: as `docker inspect` has it"""
    text = 'exited with %s' % state.get('ExitCode')
    if state.get('OOMKilled'):
        return '%s, %s' % (text, OUT_OF_MEMORY)
    return text

def past_text(state, restarts):
    """How often docker had to start a container again, and why if it was for memory."""
    if not restarts:
        return ''
    text = 'started again %d time%s' % (restarts, 's' if restarts > 1 else '')
    if state.get('OOMKilled'):
        return '%s, %s' % (text, OUT_OF_MEMORY)
    return text

def joined_state(states):
    """The State of some containers as one: as well as the one that is worst."""
    def by_health(state):
        return ['unhealthy', 'starting', 'healthy', ''].index(state.health)

    worst = min(states, key=by_health)
    dead = [state for state in states if state.alive is False]
    alive = None                            # some are still starting
    if dead:
        alive = False
    elif all(state.alive for state in states):
        alive = True
    return State(
        alive=alive,
        identity=tuple(state.identity for state in states),
        ports=[port for state in states for port in state.ports],
        health=worst.health,
        check=worst.check,
        text=dead[0].text if dead else states[0].text,
        pids=[pid for state in states for pid in state.pids],
        past='; '.join(state.past for state in states if state.past))

CHECK_LETTERS = 160             # of what a HEALTHCHECK prints: its end, as curl has it

def check_text(health):
    """What a HEALTHCHECK said when it was run last, as `exit status 1: why`; '' where it
    did not fail. health: State.Health of `docker inspect`"""
    runs = health.get('Log') or [{}]
    status = runs[-1].get('ExitCode')
    if not status:
        return ''

    output = native(runs[-1].get('Output') or '')
    said = ' '.join(plain_line(output.replace('\r', ' ')).split())
    said = printable(said, len(said))
    if not said:
        return 'exit status %d, without a word' % status
    if len(said) > CHECK_LETTERS:
        said = '...' + said[-CHECK_LETTERS:]
    return 'exit status %d: %s' % (status, said)

class Engine(object):
    """What keeps an app running: all that `apply`, and what it calls, knows of it.

    A release is whole when it comes here: its image is there, and its files are in the
    store. Every method may be called again after a crash in the middle of it, and then
    finds some of its work done already. What docker or init refuse is a Failure.
    """
    runs_by_tag = False     # whether what it starts is the image that is called latest
    takes_names_of = CONTAINERS     # docker's things that have its names

    def __init__(self, app):
        self.app = app
        self.host = app.host
        self.docker = app.docker

    @classmethod
    def takes(cls, host, release):
        """Whether this engine can run a release on this server. The first of ENGINES that
        can does."""
        raise NotImplementedError

    def check(self, release):
        """Failure where this release cannot run here. Its image is not built yet."""

    def doubts(self, release, ports, volumes):
        """[(line, text)] of what is doubtful in its job; Failure for what would kill it.
        ports, volumes: as check_job wants them"""
        return check_job(job_of(release), release.app, ports, volumes)

    def names_taken(self, release):
        """The names that nobody else's container may have when it comes."""
        return [process.name for process in processes_of(release)]

    def prepare(self, release, is_ready=False, is_launched=False):
        """Make ready what can be while an earlier release goes on: the gap is as long as
        what is left. Nothing runs yet, and nothing of it starts by itself, not even at
        boot.
        is_ready: whether its containers are there, and none starts by itself; those of a
        kept release may be there all the same
        is_launched: whether `launch` follows, for its front part"""

    def place(self, release):
        """Put where init finds it what says how to run this release. The earlier one has
        been stopped; nothing starts at boot before `settle`."""

    def start(self, release):
        """Start it, where it does not run. What was made ready may be gone: make it."""
        raise NotImplementedError

    def launch(self, release):
        """The same beside an earlier one that goes on, for what was not made ready."""
        self.start(release)

    def stop(self, release):
        """Stop it, and what a killed process left of it; nothing brings it back, be it at
        boot or after a crash of docker. It may be stopped, or gone, already."""
        raise NotImplementedError

    def end_stops(self, release):
        """Where its dockhand was killed as it had it stopped, bring that to its end: what
        still runs would not run on, and a start would do nothing."""

    def withdraw(self, release):
        """Take away what `place` put there: another engine follows, or nothing does."""

    def settle(self, release):
        """It has passed its checks: from now on it is started by itself at boot, and
        where it dies."""

    @contextmanager
    def settling(self, release):
        """The same, beside what is done inside the `with`."""
        yield
        self.settle(release)

    def revives(self, release):
        """Whether one that is live and does not run is to be started, after a boot."""
        return True

    def state(self, release):
        """Its State at this moment."""
        raise NotImplementedError

    @contextmanager
    def watched(self, release, is_first):
        """Inside a `with`, a function that gives its State at this moment, or what that
        is as long as nothing says otherwise. is_first: whether it is a first look, that
        is followed by more"""
        yield partial(self.state, release)

    def join(self, release):
        """What of it runs is to reach other machines, and to be reached from there."""

    def check_complete(self, release):
        """Failure where what its image says of it cannot be had here."""

    def with_machines(self, release):
        """The Release with the places that it is to have on other machines, if any; under
        the lock of the host."""
        return release

    def relocated(self, release):
        """The Release, that was live before, with the places that it is to have now;
        Failure where it cannot have any."""
        return release

    def running(self, releases):
        """Which of some earlier [Release] run still, beside the one that is live."""
        return []

    def overlaps(self, old, new):
        """Whether two releases, either may be None, may run at once for a time."""
        return False

    def places(self, release):
        """Where nginx reaches it: [(address, port)], none of a job, whose own file says
        that."""
        return [(address, release.port) for address in release.addresses]

    def cron_script(self, release):
        """The sh that runs a line of its crontab; '' where it brings none."""
        return ''

    def image_ref(self, release):
        """What docker makes its containers from."""
        return release.image

    def run_once(self, release, argv, each):
        """Run a command in its image, in its environment; the exit status. each: gets
        the lines that it prints"""
        raise NotImplementedError

    def once(self, release):
        """The same for a command of a person's: (options of `docker create`, the
        variables that they name, the folder to run it in)."""
        raise NotImplementedError

    def remove(self, release):
        """Remove what is left of it in docker, but for its image and its data."""
        self.docker.remove_containers(self.names_taken(release), '-v')
        if release_command(release):
            self.host.ask(['docker', 'rm', '-f', '-v', once_name(release)])
        lines = cron_lines(release)
        if lines:
            names = [cron_container(release, line) for line in lines]
            self.docker.remove_containers(names, '-v')

    def logs_command(self, release, lines, *follow):
        """The command that prints its last lines: so many, a str; `-F` goes on."""
        raise NotImplementedError

    def own(self, release):
        """The [Process] of it that are containers of this server, by their names: none
        where init has them."""
        return []

    def logged(self, release):
        """The [Process] of it whose logs docker has, each for itself: none where init has
        one for them all."""
        return []

    def log_of(self, process):
        """The command that prints the log of one of these, without options, and the name
        that comes last."""
        return ['docker', 'logs'], process.name

    def container_here(self, process):
        """The name of the container of one of these, on this server; or Failure."""
        return process.name

    def log_end(self, release):
        """Where its log ends at this moment, before it is started."""

    def new_lines_command(self, release, lines, end):
        """The command that prints its last lines, so many at least if there are, of what
        came behind such an end: not those of an earlier start."""
        return self.logs_command(release, lines)

# Options of `docker run` that only one container can have at a time
PLACES = ('--ip', '--ip6', '--link-local-ip', '--mac-address', '--net-alias',
          '--network-alias', '--publish', '--publish-all')

def without_places(options):
    """The options for a container beside the app's own: it takes neither port nor address
    from that, nor its name on the network."""
    kept = []
    for option in options:
        name, equals, value = option.partition('=')
        if name in PLACES:
            continue
        if name in ('--net', '--network'):
            fields = [field for field in value.split(',')
                      if not field.startswith(('alias=', 'ip=', 'ip6=', 'mac-address='))]
            option = name + equals + ','.join(fields)
        kept.append(option)
    return kept

def caps_beside(options, log):
    """What a container gets besides some options where these say nothing of it. log: how
    docker is to keep what it prints"""
    caps = []
    if not any(option.startswith('--log-') for option in options):
        caps += log
    if not any(option.startswith('--pids-limit') for option in options):
        caps.append(PIDS_CAP)
    return caps

def run_in_image(host, release, options, argv, each, env, cwd):
    """`docker run` in the image of a release; the exit status."""
    run = ['docker', 'run', '--rm', '--name', once_name(release)] + options
    run += caps_beside(options, []) + [release.image] + argv
    return host.ask(run, each=each, idle=say_busy, env=env, cwd=cwd).status

def once_name(release):
    """The name of the container in which a release's command runs once."""
    return container_name(release) + '--release'

class Containers(Engine):
    """Docker itself keeps the app running: a container for each process."""
    @classmethod
    def takes(cls, host, release):
        return True

    def container(self, release, process):
        """How docker runs a process; Failure where it cannot."""
        env_file = self.app.release_folder(release.number) + '/env'
        if not release.job:
            return plain_container(release, process, env_file)
        job = container_of(job_of(release), release.app)
        # A job names the file that Upstart's engine writes; each release has its own.
        env_in_force = '--env-file=%s/apps/%s/env' % (STATE, release.app)
        if env_in_force not in job.options:
            return job
        env = long_variables(release)
        options = ['--env-file=' + env_file if option == env_in_force else option
                   for option in job.options]
        options += ['--env=' + name for name in sorted(env)]
        return job._replace(options=options, env=dict(job.env, **env))

    def any_container(self, release):
        """The same where it is the same for all."""
        return self.container(release, processes_of(release)[0])

    def own(self, release):
        return processes_of(release)

    def own_names(self, release):
        return [process.name for process in self.own(release)]

    def check(self, release):
        if release.job:
            self.any_container(release)
        # With another init `install` has asked for that already.
        refuse_if(is_upstart(self.host) and self.docker.version() < (1, 11),
                  'without an upstart.conf an app wants docker 1.11 or later')

    def doubts(self, release, ports, volumes):
        """All but what holds for init alone."""
        doubts = Engine.doubts(self, release, ports, volumes)
        return [(line, text) for line, text in doubts
                if not text.startswith(UPSTART_ONLY)]

    def image_ref(self, release):
        """Its own image by id, or that which its job names."""
        image = self.any_container(release).image
        return release.image if is_image_of(release.app, image) else image

    def overlaps(self, old, new):
        """Both are plain apps, and web apps without data, or config says that they may:
        two that share a volume destroy it."""
        if old is None or new is None:
            return False
        if old.job or new.job:
            return False
        both_safe = all(release.web and not release.volumes and not has_places(release)
                        for release in (old, new))
        return new.config.get('overlap', 'yes' if both_safe else 'no') == 'yes'

    def running(self, releases):
        """A job's own container was stopped before the next one was started."""
        plain = [release for release in releases if not release.job]
        names = [name for release in plain for name in self.own_names(release)]
        containers = self.docker.inspect(*names) if names else []
        running = set(container['Name'][1:] for container in containers
                      if container['State']['Running'])
        return [release for release in plain
                if running.intersection(self.own_names(release))]

    def run_once(self, release, argv, each):
        """Beside the app: with its volumes and its network, but not its names there."""
        job = self.any_container(release)
        options = self.beside(job.options)
        if not release.job:
            self.docker.ensure_network(release.addresses[0])
        return run_in_image(self.host, release, options, argv, each, job.env,
                            job.folder)

    def beside(self, options):
        """The options for a container beside the app's own: it takes no place of theirs,
        and where there are machines it reaches what runs there by its name."""
        options = without_places(options)
        if not self.host.machines.are_any():
            return options
        return ['--net=' + OVERLAY if option == '--net=' + NETWORK else option
                for option in options]

    def once(self, release):
        job = self.any_container(release)
        options = self.beside(job.options)
        options += self.common_options(release, options, ['--log-driver=none'])
        return options, job.env, job.folder

    def cron_script(self, release):
        if not release.crontab:
            return ''
        # The paths that it names are those of the server, whatever stands before them.
        store = '%s/apps/%s/releases/%d' % (STATE, release.app, release.number)
        job = plain_container(release, processes_of(release)[0], store + '/env')
        options = self.beside(job.options)
        options += self.common_options(release, options, ['--log-driver=none'])
        return render_cron_script(release, options + [release.image], job.env)

    def common_options(self, release, options, log):
        """What each container of a release gets besides its options. log: how docker is
        to keep what it prints, where the options do not say"""
        own = ['--label=dockhand.app=' + release.app]
        if not release.job and self.docker.has_init():
            own.append('--init')
        return own + caps_beside(options, log)

    def prepare(self, release, is_ready=False, is_launched=False):
        """Create the containers, so that the gap is a stop and a start, no more. Until it
        is checked, docker starts none at boot."""
        if is_launched and self.is_made_by_launch(release):
            release = workers_of(release)
        forbid = ('update', '--restart', 'no')
        if not is_ready and release.seconds is not None:
            is_ready = self.docker.on_containers(self.own_names(release), *forbid)
        if not is_ready:
            there = [process.name for process in self.own(release)
                     if not self.create(release, process)]
            self.docker.on_containers(there, *forbid)
        self.join(release)

    def join(self, release):
        if not self.host.machines.are_any():
            return
        for process in self.own(release):
            is_named = process.type in FRONT and '.' not in release.app
            self.host.machines.join(process.name, release.app if is_named else None)

    def create(self, release, process):
        """Create the container of a process; False where it is there."""
        return self.make(release, process, 'create', 'already in use')

    def make(self, release, process, verb, expected):
        """Have docker `create` or `run` the container of a process; False where that
        fails with words that are expected."""
        job = self.container(release, process)
        argv = ['docker', verb, '--name', process.name] + job.options
        if verb == 'run':
            argv.append('--detach')
        argv += self.common_options(release, job.options, LOG_CAP)
        argv += [self.image_ref(release)] + job.command
        return self.host.run_unless(expected, argv, env=job.env, cwd=job.folder)

    def is_made_by_launch(self, release):
        """Whether it is new, and has to reach nothing else before it runs."""
        return release.seconds is None and not self.host.machines.are_any()

    def launch(self, release):
        """Create and start its containers, by one command each."""
        if not self.is_made_by_launch(release):
            return self.start(release)
        trouble = 'already in use|network .* not found'
        for process in self.own(release):
            if not self.make(release, process, 'run', trouble):
                self.start_process(release, process)

    def start(self, release):
        for process in self.own(release):
            self.start_process(release, process)

    def start_process(self, release, process):
        """Start a container; if it was pruned away, or its network, it is new."""
        argv = ['docker', 'start', process.name]
        gone = 'No such container|marked for removal|network .* not found'
        if self.host.run_unless(gone, argv):
            return
        self.docker.remove_containers([process.name])
        if not release.job:
            self.docker.ensure_network(release.addresses[0])
        self.create(release, process)
        self.join(part_of(release, [process.name]))
        self.host.run(argv)

    def stop(self, release):
        """Stop it for good: docker's own start must not bring it back beside another, not
        even where docker dies half-way. While a container is coming to its end, docker
        refuses to update it: then that is done afterwards."""
        names = self.own_names(release)
        forbid = ['docker', 'update', '--restart', 'no'] + names
        refused = self.host.ask(forbid).status != 0
        grace = self.any_container(release).grace
        self.docker.on_containers(names, 'stop', '-t', grace)
        if refused:
            self.docker.on_containers(names, 'update', '--restart', 'no')

    def end_stops(self, release):
        names = [container['Name'][1:]
                 for container in self.docker.inspect(*self.own_names(release))
                 if container['State']['Running'] and restart_policy(container) == 'no']
        if names:
            grace = self.any_container(release).grace
            self.docker.on_containers(names, 'stop', '-t', grace)

    def revives(self, release):
        """As its job says; a plain app is started."""
        return self.any_container(release).at_boot

    def settle(self, release):
        """From now on docker starts it again by itself, at boot too. (With the policy
        `unless-stopped` it would not after a kill of dockerd.)"""
        self.docker.on_containers(self.own_names(release), 'update', '--restart',
                                  self.policy(release))

    @contextmanager
    def settling(self, release):
        with self.docker.updating(self.own_names(release), self.policy(release)):
            yield

    def policy(self, release):
        """Docker's word for when it starts a live release again."""
        return 'always' if self.revives(release) else 'on-failure'

    def state(self, release):
        return joined_state(self.own_states(release))

    def own_states(self, release):
        """The [State] of its containers."""
        found = dict((container['Name'][1:], container)
                     for container in self.docker.inspect(*self.own_names(release)))
        return [self.process_state(release, process, found.get(process.name))
                for process in self.own(release)]

    @contextmanager
    def watched(self, release, is_first):
        """What one container without a HEALTHCHECK has is known, but not when it ends:
        that docker says at once, to who waits for it. (To ask takes 40 ms each time.)
        Where that has come to an end, be it for its time, docker is asked."""
        expected = self.expected_state(release)
        if expected is None:
            yield partial(self.state, release)
        elif is_first:
            looks = iter([expected])        # docker is asked from the second one on
            yield lambda: next(looks, None) or self.state(release)
        else:
            name = processes_of(release)[0].name
            with self.host.begin(['docker', 'wait', name]) as waiting:
                yield lambda: self.state(release) if waiting.is_over() else expected

    def expected_state(self, release):
        """The State of a release that runs, where that is known without docker; else
        None. Its identity is not."""
        processes = processes_of(release)
        if release.job or not release.port or release.healthcheck is not False:
            return None
        if len(processes) > 1:
            return None
        return State(True, None, [(processes[0].address, release.port)], '', 'running')

    def process_state(self, release, process, container):
        """The State of a process. container: as docker describes it, None if it is
        gone"""
        if container is None:
            gone = 'its container is gone'
            if process.type:
                gone = 'the container of %s is gone' % title_of(process)
            return State(False, None, [], '', gone)
        state = container_state(container)
        if release.job:
            return state

        # nginx connects to a web app's port, even if a HEALTHCHECK says that it is well
        is_asked = release.web or release.port and not state.health
        if release.port and 'check' in release.config:
            is_asked = True
        if process.type not in FRONT:
            is_asked = False
            title = title_of(process)
            state = state._replace(text='%s %s' % (title, state.text),
                                   past=state.past and '%s %s' % (title, state.past))
        return state._replace(ports=[(process.address, release.port)] if is_asked else [])

    def logs_command(self, release, lines, *follow):
        process = processes_of(release)[0]
        return ('docker', 'logs', '--tail', lines) + follow + (process.name,)

    def logged(self, release):
        return processes_of(release)

    def log_end(self, release):
        """A moment, as `--since` wants it."""
        return time_for_docker(self.host.clock.time())

    def new_lines_command(self, release, lines, end):
        return self.logs_command(release, lines, '--since=' + end)

class Upstart(Engine):
    """Upstart keeps the app running, as its upstart.conf says: the job is named APP."""
    held = 'manual\n'   # an override that keeps a reboot from starting a mixture
    runs_by_tag = True

    @classmethod
    def takes(cls, host, release):
        return bool(release.job) and is_upstart(host)

    def path(self, release, ending):
        """The job's file `.conf` or `.override`."""
        return self.host.path(JOBS, release.app + ending)

    def run_once(self, release, argv, each):
        """Of the job only its environment is known here."""
        env_file = self.app.release_folder(release.number) + '/env'
        options = ['--env-file=' + env_file]
        return run_in_image(self.host, release, options, argv, each, {}, '/')

    def once(self, release):
        """With the options of the job's `docker run`; where docker alone could not do
        what the job does, config's variables are all that is known."""
        try:
            job = container_of(job_of(release), release.app)
        except Failure:
            env_file = self.app.release_folder(release.number) + '/env'
            return ['--env-file=' + env_file, '--log-driver=none', PIDS_CAP], {}, '/'
        options = without_places(job.options)
        options += caps_beside(options, ['--log-driver=none'])
        return options, job.env, job.folder

    def prepare(self, release, is_ready=False, is_launched=False):
        """Failure where somebody else's job has the name, before anything is stopped."""
        check_not_foreign(self.host, '%s/%s.conf' % (JOBS, release.app), release.app)

    def place(self, release):
        replace_file(self.app.folder('env'), environment_text(release), 0o600)
        replace_file(self.path(release, '.override'), self.held)
        replace_file(self.path(release, '.conf'), release.job)

    def start(self, release):
        refuse_if(read_file(self.path(release, '.conf')) != release.job,
                  'its job is not that of release %d', release.number)
        self.host.run_unless('already running', ['timeout', '60', 'start', release.app])

    def stop(self, release):
        """Stop the job, and the containers that init leaves behind. Without the file of a
        running job `stop` fails, although it stops: init knows the job no more."""
        replace_file(self.path(release, '.override'), self.held)
        if not os.path.exists(self.path(release, '.conf')):
            replace_file(self.path(release, '.conf'), release.job)
        self.host.run_unless('Unknown|already been stopped|Method "Get" with signature',
                             ['stop', release.app])

        for container in self.docker.running(release.image):
            stop = ['docker', 'stop', '-t', '1', container['Id']]
            self.host.run_unless('No such container', stop)
        self.free_names(release)

    def free_names(self, release):
        """Remove a container of ours that holds the `--name` of the job: its client was
        killed before it could do that."""
        names = [option.value for option in options_of(job_of(release))
                 if option.name == 'name']
        holders = self.docker.inspect(*names) if names else []
        if not holders:
            return

        ours = [self.app.load(number).image for number in self.app.numbers()]
        self.docker.remove_containers([container['Id'] for container in holders
                                       if container.get('Image') in ours])

    def revives(self, release):
        """init starts it by its events, but not where a command was killed that held the
        job, or where docker was away for too long."""
        if os.path.exists(self.path(release, '.override')):
            return True
        if not os.path.exists(self.path(release, '.conf')):
            return True
        return starts_at_boot(job_of(release))

    def settle(self, release):
        remove_file(self.path(release, '.override'))

    def withdraw(self, release):
        if is_ours(read_file(self.path(release, '.conf')), release.app):
            remove_file(self.path(release, '.conf'))
        remove_file(self.path(release, '.override'))
        remove_file(self.app.folder('env'))

    def state(self, release):
        _, out, err = self.host.ask(['status', release.app])
        text = printable((out or err).strip())
        running = re.search(r' start/running(?:, process (\d+))?', text)
        if not running:
            alive = None if ' start/' in text else False
            return State(alive, None, [], '', text or 'no such job')

        for container in self.docker.running(release.image):
            if not self.is_left_over(container, running.group(1)):
                state = container_state(container)
                identity = running.groups() + state.identity
                return state._replace(identity=identity, text=text)

        # Without a container of its image: one is to come, or it runs another image.
        images = [words[0].value for _, words in runs_of(job_of(release))]
        is_to_come = any(is_image_of(release.app, image) for image in images)
        return State(None if is_to_come else True, running.groups(), [], '', text)

    def is_left_over(self, container, process):
        """Whether a container began before the process of the job: it is that of an
        earlier one, which was killed."""
        began = start_ticks(self.host, container['State'].get('Pid'))
        if began is None:
            return False
        job_began = start_ticks(self.host, process)     # None: it ended just now
        return job_began is None or began < job_began

    def logs_command(self, release, lines, *follow):
        return ('tail', '-n', lines) + follow + (self.log_path(release),)

    def log_path(self, release):
        return self.host.path(JOB_LOGS, release.app + '.log')

    def log_end(self, release):
        """In bytes: init goes on in the same file, whatever release it is of."""
        path = self.log_path(release)
        return os.path.getsize(path) if os.path.exists(path) else 0

    def new_lines_command(self, release, lines, end):
        if self.log_end(release) < end:     # it was rotated in the meantime
            end = 0
        return ('tail', '-c', '+%d' % (end + 1), self.log_path(release))

class Swarm(Containers):
    """Docker's swarm keeps the web process running, on several machines: a service for
    each release, named as its container would be. All else of it is containers here."""
    takes_names_of = ()     # of services too

    @classmethod
    def takes(cls, host, release):
        return 'machines' in release.config and not release.job

    def own(self, release):
        return processes_of(workers_of(release))

    def service(self, release):
        """The name of its service, '' where this part of it has none."""
        return ''.join(map(service_name, processes_of(front_of(release))))

    def check(self, release):
        refuse_if(not self.host.machines.are_any(), 'machines=%s, and there are none: '
                  'dockhand machines add root@ADDRESS', release.config['machines'])
        Containers.check(self, release)

        wanted = release.config['machines']
        there = len(self.host.machines.addresses())
        refuse_if(wanted != 'all' and int(wanted) > there, 'machines=%s, and there are '
                  '%d: dockhand config %s machines=%d, or dockhand machines add '
                  'root@ADDRESS', wanted, there, release.app, there)

        refuse_if('web' in scale_of(release), 'scale counts web, which runs once on each '
                  'machine: leave out one of machines and scale')
        for option in own_options(release):
            service_option(option)

    def check_complete(self, release):
        refuse_if(not release.web, 'machines is for web apps: this one stays here, where '
                  'the others reach it by its name')
        refuse_if(release.volumes, 'machines: its VOLUME %s is on one machine alone, and '
                  'goes to no other', ' '.join(release.volumes))

    def with_machines(self, release):
        port = free_port(self.host, release.number)
        return release._replace(machines=self.host.machines.addresses(), published=port)

    def relocated(self, release):
        self.check(release)
        return release._replace(machines=self.host.machines.addresses())

    def places(self, release):
        return [(address, release.published) for address in release.machines]

    def prepare(self, release, is_ready=False, is_launched=False):
        """Its image goes to each machine that can be reached."""
        machines = self.host.machines
        having, wrong = machines.bring(release, image_tag(release))
        others = [machine for machine in having if not machine.is_front]
        refuse_if(not others, 'no other machine took its image: %s',
                  '; '.join(wrong) or 'none may run anything (dockhand machines)')
        if wrong:
            step('On %d of %d machines: %s', len(having), len(having) + len(wrong),
                 '; '.join(wrong))

        if release.seconds is not None:     # what once ended of it is no fault of now
            self.remove_service(release)
        self.create_service(release)
        Containers.prepare(self, release, is_ready)

    def create_service(self, release):
        env_file = self.app.release_folder(release.number) + '/env'
        words, env = service_words(release, env_file, self.host.machines.front().address,
                                   self.docker.has_init())
        argv = ['docker', 'service', 'create', '--quiet'] + words
        self.host.run_unless('already exists|name conflicts', argv, env=env)

    def remove_service(self, release):
        self.host.run_unless('no such service|not found',
                             ['docker', 'service', 'rm', self.service(release)])

    def wanted(self, release):
        """On how many machines it is to run."""
        wanted = release.config['machines']
        if wanted == 'all':
            return len(release.machines)
        return int(wanted)

    def start(self, release):
        service = self.service(release)
        if service and not self.host.machines.scale(service, self.wanted(release)):
            self.create_service(release)        # somebody has removed it
            self.host.machines.scale(service, self.wanted(release))
        Containers.start(self, release)

    def stop(self, release):
        service = self.service(release)
        if service:
            self.host.machines.scale(service, 0)
            self.wait_for_end(service, int(grace_of(release)))
        if self.own(release):
            Containers.stop(self, release)

    def wait_for_end(self, service, grace):
        """Wait until no machine that is up runs a service any more."""
        clock = self.host.clock
        deadline = clock.monotonic() + grace + NODE_PATIENCE
        while self.runs_somewhere(service):
            if clock.monotonic() > deadline:
                raise Failure('%s does not end: docker service ps %s', service, service)
            clock.sleep(0.2)

    def runs_somewhere(self, service):
        """Whether a machine that is up runs it. (One that has just died seems to, until
        docker's manager misses it.)"""
        at_work = set(task.machine for task in self.host.machines.tasks(service)
                      if is_at_work(task))
        if not at_work:
            return False
        up = [machine.name for machine in self.host.machines.all() if is_up(machine)]
        return not at_work.isdisjoint(up)

    def end_stops(self, release):
        if self.own(release):
            Containers.end_stops(self, workers_of(release))

    def settle(self, release):
        if self.own(release):
            Containers.settle(self, release)

    @contextmanager
    def settling(self, release):
        yield
        self.settle(release)

    def state(self, release):
        states = []
        service = self.service(release)
        if service:
            states.append(self.service_state(release, service))
        if self.own(release):
            states += self.own_states(release)
        return joined_state(states)

    def service_state(self, release, service):
        """The State of its service, on the machines that are up."""
        machines = self.host.machines.all()
        up = dict((machine.name, machine) for machine in machines if is_up(machine))
        tasks = self.host.machines.tasks(service)
        heard = [task for task in tasks if task.machine in up]
        running = [task for task in heard if is_running(task)]
        died = [task for task in heard if has_died(task)]

        asked = [machine for machine in machines if machine.address in release.machines]
        spread = spread_text(asked, running, self.wanted(release))
        reason = ''
        if not any(is_wanted(task) for task in tasks):
            alive = self.alive_before_tasks(service)
            reason = 'it runs on no machine'
        elif self.app.linked_number('pending') == release.number:
            alive, reason = self.alive_on_trial(release, running, died, up.values())
        else:
            alive = True if running else None       # where one ends docker starts another

        return State(
            alive=alive,
            identity=tuple(sorted(task.id for task in died)),
            ports=[(up[task.machine].address, release.published) for task in running],
            health='',
            text=reason or spread,
            past=spread)

    def alive_before_tasks(self, service):
        """Whether a service that docker is to run nowhere is alive, as State has it: its
        tasks are made some time after it is scaled."""
        are_coming = self.host.machines.wanted().get(service)
        return None if are_coming else False

    def alive_on_trial(self, release, running, died, up):
        """(Whether its service is alive, as State has it; why not, in words), until it
        has passed its checks: a task that died is one that it does not survive, and all
        are waited for. running, died: [Task]; up: [Machine]"""
        if died:
            task = died[0]
            return False, 'on %s: %s' % (task.machine, task.error or task.state)
        able = [machine for machine in up if machine_label(release) in machine.labels]
        wanted = min(self.wanted(release), len(able))
        if not running or len(running) < wanted:
            return None, ''
        return True, ''

    @contextmanager
    def watched(self, release, is_first):
        yield partial(self.state, release)

    def running(self, releases):
        if not releases or not self.host.machines.are_any():
            return []
        wanted = self.host.machines.wanted()
        by_service = [release for release in releases
                      if wanted.get(self.service(release))]
        by_container = Containers.running(self, releases)
        return [release for release in releases
                if release in by_service or release in by_container]

    def remove(self, release):
        """Where a machine cannot be reached its label stays, and says what is to go."""
        machines = self.host.machines
        if machines.are_any():
            self.remove_service(release)
            label = machine_label(release)
            for machine in machines.all():
                if machine.is_front:
                    machines.ask(machine, DROP_CONTAINERS, self.service(release))
                machines.drop(machine, label)

        Containers.remove(self, release)

    def names_taken(self, release):
        service = self.service(release)
        return ([service] if service else []) + self.own_names(release)

    def log_of(self, process):
        if process.type in FRONT:
            return ['docker', 'service', 'logs'], service_name(process)
        return Containers.log_of(self, process)

    def logs_command(self, release, lines, *follow):
        words, name = self.log_of(processes_of(release)[0])
        return tuple(words) + ('--tail', lines) + follow + (name,)

    def container_here(self, process):
        if process.type not in FRONT:
            return process.name
        service = service_name(process)
        label = 'label=com.docker.swarm.service.name=' + service
        here = self.host.run(['docker', 'ps', '-q', '--filter', label]).split()
        refuse_if(not here, 'it runs on other machines: docker service ps %s', service)
        return here[0]

def word_of(task):
    """Docker's word for the state of a Task, without since when."""
    return task.state.split(' ')[0]

def is_wanted(task):
    """Whether docker is to have a Task run, at once or after a pause."""
    return task.wanted in ('Running', 'Ready')

def is_running(task):
    """Whether a Task runs, and is to."""
    return is_wanted(task) and word_of(task) == 'Running'

def has_died(task):
    """Whether a Task has ended, and nobody told it to."""
    return word_of(task) in ('Failed', 'Rejected', 'Complete')

def is_at_work(task):
    """Whether a Task runs, or is about to."""
    return word_of(task) not in (
        'Shutdown', 'Complete', 'Failed', 'Rejected', 'Orphaned', 'Remove')

def spread_text(machines, running, wanted):
    """On how many machines an app runs, and which of these are not up. running: [Task]"""
    text = 'on %d of %d machines' % (len(running), wanted)
    missing = ['%s is %s' % (machine.name, state_text(machine)) for machine in machines
               if not is_up(machine)]
    if missing:
        text += ': ' + ', '.join(missing)
    return text

# Who runs a release: the first of these that takes it.
ENGINES = [Upstart, Swarm, Containers]

def engine_of(app, release):
    """The engine that runs a release."""
    for kind in ENGINES:
        if kind.takes(app.host, release):
            return kind(app)

LOOK_EACH = 0.1                 # seconds
ACCEPTS_WITHIN = 0.05           # seconds: a SYN that is lost is sent again after one

def check_health(release, engine, timeout=HEALTH_TIMEOUT, steady=STEADY):
    """Wait until a release answers and keeps running; the moment of its first answer, and
    its State. Failure as soon as none can come. Without a HEALTHCHECK to say so, it
    answers when the container's own ports accept (docker's proxy accepts whatever is
    behind it), and the page that config's `check` names is there."""
    clock = engine.host.clock
    begun = since = clock.monotonic()
    identity = None
    deaths = 0
    answered = None
    with engine.watched(release, is_first=steady == 0) as look:
        while True:
            looked = clock.monotonic()
            state = look()
            check_state(state)
            if state.identity not in (None, identity):
                if identity is not None:
                    deaths += 1
                identity = state.identity
                since = looked
                answered = None
            refuse_if(deaths > 3, 'it keeps dying and being started again')

            patience = LOOK_EACH if answered is None else 0
            missing = silent_ports(engine.host, state, patience)
            left = begun + timeout - clock.monotonic()
            if state.alive and not missing and answered is None:
                missing = page_problem(engine.host, release, state.ports,
                                       max(1, min(left, PAGE_TIMEOUT)))
            if state.alive and not missing:
                answered = answered or clock.monotonic()
                if clock.monotonic() - since >= steady:
                    return answered, state
            if clock.monotonic() - begun > timeout:
                if state.alive and not silent_ports(engine.host, state):
                    missing = page_problem(engine.host, release, state.ports, 1,
                                           NO_END) or missing
                raise Failure('after %d s %s (config timeout=N gives it more time)',
                              timeout, missing or 'it is not running yet')
            rest_after_look(clock, looked)

def rest_after_look(clock, looked):
    """Wait until the next look is due. looked: the moment of the last one; where that has
    taken long, docker has a rest all the same"""
    left = looked + LOOK_EACH - clock.monotonic()
    left = max(left, LOOK_EACH / 2)
    left = min(left, LOOK_EACH)         # on Python 2 somebody may have set the clock back
    clock.sleep(left)

def check_state(state):
    """Failure where an app that is in this State does not get well any more."""
    refuse_if(state.alive is False, 'it does not run: ' + state.text)
    refuse_if(state.health == 'unhealthy',
              and_then('its HEALTHCHECK says unhealthy', state.check))

NO_END = b'\0'                  # of an answer that is read with its body
PAGE_TIMEOUT = 10               # seconds for one answer, of those that a check has

def page_problem(host, release, places, timeout, end=HEAD_END):
    """What is wrong with the page that config's `check` names, '' where nothing is: it is
    asked for at each place that answers requests. places: [(address, port)]; end: of what
    is read of an answer"""
    path = release.config.get('check')
    if path is None:
        return ''

    name = (names_for_https(release.proxy or '') + [release.app])[0]
    for address, port in places:
        try:
            answer = fetch_head(host, name, port, timeout, address, path, end=end)
            if re.match('[23][0-9][0-9]\\Z', status_in(answer)):
                continue
        except EnvironmentError as error:
            return 'GET %s: %s' % (path, error.strerror or error)
        return 'GET %s answers %s' % (path, answer_text(answer))
    return ''

def answer_text(answer):
    """The status of an answer, and the first line of its body, for a terminal."""
    head, _, body = answer.partition('\r\n\r\n')
    lines = [line.strip() for line in body.split('\n') if line.strip()]
    return and_then(status_in(head), printable(''.join(lines[:1]), 160))

def and_then(text, reason):
    return text + ', ' + reason if reason else text

def silent_ports(host, state, patience=0):
    """What does not answer yet, in words; '' when all does. patience: seconds in which it
    may yet come to that"""
    if state.health not in ('', 'healthy'):
        return and_then('its HEALTHCHECK is still ' + state.health, state.check)
    deadline = host.clock.monotonic() + patience
    for address, port in state.ports:
        while not accepts(host, address, port):
            if host.clock.monotonic() >= deadline:
                return 'nothing listens on port %d of the container' % port
            host.clock.sleep(0.02)
    return ''

def accepts(host, address, port):
    """Whether something listens there."""
    try:
        host.connect((address, port), ACCEPTS_WITHIN).close()
    except EnvironmentError:
        return False
    return True

# ---- Switching: one function makes the host match a release ----------------------------
# A deploy, a rollback, a change of config, and putting back are all `apply`. It knows no
# engine by name. Uses the app, the engines and nginx.

def check_proxy_change(app, release, older=False, is_tested_later=False):
    """Failure where the proxy file of a release cannot be had beside the others.
    older, is_tested_later: as Nginx.check wants them"""
    if release.proxy:
        with host_lock(app.host):
            app.nginx.check(release, app.nginx.files(), older, app.known,
                            is_tested_later)

# gap: seconds in which the app did not answer, None where it always did; checked: seconds
# spent on health checks
Switch = namedtuple('Switch', 'gap checked')

def apply(app, old, new, is_ready=False):
    """Make the host match a release, or put the old one back and raise; a report.
    is_ready: as Engine.prepare has it

    `pending` says what is being switched to; moving `live` is the commit point."""
    clock = app.host.clock
    engine = engine_of(app, new)
    begun = clock.monotonic()
    served = old is not None and not app.is_stopped()
    overlap = is_handed_over(app, old, new)

    # Another app may have taken one of its names while this one was built. Where both
    # overlap that is found when nginx is switched, and nothing is down yet.
    if old is None or (not overlap and new.proxy != old.proxy):
        check_proxy_change(app, new, was_live(old, new))
    # If it goes no further, `forget` removes what is new of that
    engine.prepare(new, is_ready, overlap)
    write_cron_script(app, new)
    app.docker.check_takes_writes(app.name)

    with undone_by(put_back, app, old, new):
        app.set_link('pending', new)
        if overlap:
            switch = hand_over(app, old, new)
        else:
            switch = stop_then_start(app, old, new)
        place_crontab(app, new)     # late: until now a line may be the old one's alone
        new = app.count_turn(old, new)
        app.set_link('live', new)   # put_back asks for it, and then only finishes

    switched = clock.monotonic() - begun - switch.checked
    finish(app, new, git_moves_branch=is_pushed(old, new), is_settled=overlap)
    report = 'switched in %.1f s, checked in %.1f s' % (switched, switch.checked)
    if overlap:
        return report + ', no gap'
    if served:
        return report + ', down for %.1f s' % switch.gap
    return report

def is_handed_over(app, old, new):
    """Whether a release takes over while the old one runs. old: may be None"""
    return (old is not None and not app.is_stopped()
            and engine_of(app, new).overlaps(old, new))

def is_on_trial(app, old, new):
    """Whether nginx goes on with the old release, at first, where a new one fails."""
    return is_handed_over(app, old, new) and old.web and new.web

def first_shown(app, old, new):
    """A release as nginx is told of it at first: the old one answers where it fails."""
    if not is_on_trial(app, old, new):
        return new
    places = engine_of(app, old).places(old)
    return new._replace(proxy=with_backup(new.proxy, places))

def was_live(old, new):
    """Whether a release, or its image, was live before: a rule for proxy files that is
    newer than that only warns. (A push that changes the proxy file alone may give the
    live image; check_commit has held its file against all rules before.)"""
    return new.turn is not None or old is not None and new.image == old.image

def is_pushed(old, new):
    """Whether a release comes from a push: it is new, and of another commit than what was
    live. Then git moves the branch; after anything else `finish` does."""
    is_new = new.seconds is None
    return is_new and not (old is not None and old.commit == new.commit)

def hand_over(app, old, new):
    """Both run for a time, so that no request is lost, and the new one is settled; gives
    a Switch."""
    engine = engine_of(app, new)
    clock = app.host.clock
    on_trial = is_on_trial(app, old, new)
    log_end = engine.log_end(new)
    with app.nginx.testing(first_shown(app, old, new)):
        engine.launch(front_of(new))
    begun = clock.monotonic()
    check_or_show_log(app, front_of(new), log_end, steady=0 if on_trial else STEADY)
    checked = clock.monotonic() - begun
    checked += hand_work_over(app, old, new, log_end)

    app.nginx.install(first_shown(app, old, new), was_live(old, new), app.known)
    with tagging(app, new):
        if on_trial:
            begun = clock.monotonic()
            check_or_show_log(app, new, log_end)
            checked += clock.monotonic() - begun
    with engine.settling(new):
        app.nginx.install(new, was_live(old, new), app.known)
    return Switch(None, checked)

def hand_work_over(app, old, new, log_end):
    """Stop the workers of a release, and start those of another: never two at once, which
    would fetch the same message. The seconds spent on checking them."""
    clock = app.host.clock
    engine = engine_of(app, new)
    if workers_of(old).part:
        engine_of(app, old).stop(workers_of(old))
    if not workers_of(new).part:
        return 0

    engine.start(workers_of(new))
    begun = clock.monotonic()
    check_or_show_log(app, new, log_end)
    return clock.monotonic() - begun

def stop_then_start(app, old, new):
    """Never two at once: they would share data, a port, or a job. Gives a Switch."""
    engine = engine_of(app, new)
    clock = app.host.clock
    stopped = clock.monotonic()
    if old is not None:
        stop_for(app, old, engine)
    # (Not before: init starts a job that dies again, and by this tag.)
    with tagging(app, new, engine.runs_by_tag):
        engine.place(new)
        app.nginx.install(new, was_live(old, new), app.known)
    log_end = engine.log_end(new)
    engine.start(new)

    started = clock.monotonic()
    with tagging(app, new, not engine.runs_by_tag):
        answered = check_or_show_log(app, new, log_end)
    return Switch(answered - stopped, clock.monotonic() - started)

@contextmanager
def tagging(app, release, is_now=True):
    """The image of a release becomes what is meant by the name of the app alone, beside
    what is done inside the `with`. is_now: without it nothing happens"""
    if not is_now:
        yield
        return
    with app.docker.tagging(image_tag(release), latest_tag(app)):
        yield

def write_cron_script(app, release):
    """Write what cron is to call once this release is live, where it brings a crontab."""
    if release.crontab:
        path = app.host.path(cron_script_path(app.name, release.number))
        replace_file(path, engine_of(app, release).cron_script(release), 0o600)

def place_crontab(app, release):
    """Have cron know the times of a release. Which release's line runs then is decided by
    the link `live`, at that time."""
    text = render_cron_file(release)
    path = cron_path(app.name)
    if not text:
        return remove_crontab(app)
    check_not_foreign(app.host, path, app.name)
    replace_file(app.host.path(path), text)

def remove_crontab(app):
    """Have cron know no times of an app any more."""
    path = app.host.path(cron_path(app.name))
    if is_ours(read_file(path), app.name):
        remove_file(path)

def stop_for(app, release, engine):
    """Stop a release, and take its job away where another engine follows."""
    own = engine_of(app, release)
    own.stop(release)
    if type(own) != type(engine):
        own.withdraw(release)

def latest_tag(app):
    """The image that a job, or a person, means by the name of the app alone."""
    return app.name + ':latest'

def check_or_show_log(app, release, log_end=None, steady=STEADY):
    """The moment of a release's first answer; its log for the pusher if none comes.
    log_end: of its engine, before it was started; None shows what is older too"""
    engine = engine_of(app, release)
    timeout = int(release.config.get('timeout', HEALTH_TIMEOUT))
    try:
        answered, state = check_health(release, engine, timeout, steady)
        if may_be_web(release):
            tell_where_it_listens(app, release, state.pids)
        return answered
    except Failure as error:
        for process in processes_to_blame(engine, release):
            show_log(app, engine, release, process, log_end)
        names = [process.name for process in engine.own(release)]
        running = app.docker.inspect(*names) or app.docker.running(release.image)
        tell_where_it_listens(app, release, [container['State'].get('Pid')
                                             for container in running])
        raise Failure('release %d failed its health check: %s', release.number, error)

def may_be_web(release):
    """Whether a release without a port may have been meant for a web app."""
    if release.job or release.port or 'port' in release.config:
        return False
    return has_front(release)

def processes_to_blame(engine, release):
    """Those [Process] of a release that are not well, or all of them where all are."""
    processes = processes_of(release)
    if len(processes) == 1:
        return processes
    dead = [process for process in processes
            if not engine.state(part_of(release, [process.name])).alive]
    return dead or processes

def show_log(app, engine, release, process, log_end):
    """Show the last lines of a process's log. log_end: as check_or_show_log has it"""
    part = part_of(release, [process.name])
    lines = deque(maxlen=LOG_LINES)
    argv = engine.logs_command(part, str(LOG_LINES))
    if log_end is not None:
        argv = engine.new_lines_command(part, str(LOG_LINES), log_end)
    app.host.ask(argv, each=lines.append)

    whose = 'its log' if process.type == '' else 'the log of ' + title_of(process)
    it = 'It' if process.type == '' else title_of(process)
    step('The last lines of %s:' % whose if any(lines) else it + ' printed nothing')
    detail('\n'.join(lines))

def tell_where_it_listens(app, release, pids):
    """Say where a release listens that does not answer where it is asked. pids: a process
    of each of its containers"""
    alone, open_ports = listening_ports(app.host, pids)
    if release.port in open_ports:
        return                              # something else is wrong
    for port in alone:
        step('It listens on 127.0.0.1:%d alone: make it listen on 0.0.0.0', port)
    for port in open_ports:
        if not release.job:
            step('It listens on %d: dockhand config %s port=%d', port, app.name, port)

# 127.0.0.1, the same as an IPv6 address, and ::1, as /proc has them; 127.0.0.11, where
# docker itself answers for names; 0A: it listens
LOOPBACK = '(?:0{16}FFFF0000)?0100007F|0{24}01000000'
RESOLVER = '0B00007F'
LISTENS = r': ([0-9A-F]+):(\w+) \S+ 0A '

def listening_ports(host, pids):
    """([port that something listens on for its own container alone], [for others too]).
    pids: a process of each container"""
    alone = set()
    open_ports = set()
    for pid in pids:
        for name in ('tcp', 'tcp6'):
            table = host.text('/proc', str(pid), 'net', name)
            for address, port in re.findall(LISTENS, table):
                if address == RESOLVER:
                    continue
                is_alone = re.match('(?:%s)\\Z' % LOOPBACK, address)
                (alone if is_alone else open_ports).add(int(port, 16))
    return sorted(alone - open_ports), sorted(open_ports)

def take_away(app, release):
    """What undoes a first deploy, as [(function, argument...)]."""
    engine = engine_of(app, release)
    return [
        (remove_crontab, app),
        (engine.stop, release),
        (app.nginx.restore, app.name, ''),
        (engine.withdraw, release),
        (app.docker.untag, latest_tag(app))]

def ways_back(app, old, new):
    """What puts the old release back, as [(function, argument...)]."""
    old_engine = engine_of(app, old)
    new_engine = engine_of(app, new)
    served = not app.is_stopped()
    start = [(old_engine.start, old)] if served else []
    settle = [(old_engine.settle, old)] if served else []
    tag = [(app.docker.tag, image_tag(old), latest_tag(app))]
    proxy = [(app.nginx.restore, app.name, app.wanted_proxy(old))]
    crontab = [(place_crontab, app, old)]

    if served and new_engine.overlaps(old, new):
        workers = workers_of(new)       # two releases' never run at once
        rest = [(new_engine.stop, workers)] if workers.part else []
        rest += [(old_engine.end_stops, old)]
        stop = [(app.nginx.drain, new_engine.places(new)), (new_engine.stop, new)]
        return rest + start + proxy + crontab + tag + stop + settle

    # Its own stop too: a crash may have come while it was being stopped.
    again = [(old_engine.stop, old)] if served else []
    stop = again + [(stop_for, app, new, old_engine)]
    return stop + tag + [(old_engine.place, old)] + proxy + crontab + start + settle

def put_back(app, old, new, git_moves_branch=False):
    """Undo a switch, whatever was done of it. Each part that can be put back is.
    git_moves_branch: as finish has it"""
    engine = engine_of(app, new)
    live = app.live()
    put = partial(attempt, 'could not be put back')
    if live is not None and live.number == new.number:
        # A crash after the commit point; and it may be down since a power cut.
        put(engine.place, new)
        put(engine.start, new)
        return finish(app, new, git_moves_branch)

    ways = take_away(app, new) if old is None else ways_back(app, old, new)
    done = [put(*way) for way in ways]
    if not all(done):
        return say('dockhand: mend that, then: sudo dockhand recover')
    remove_file(app.folder('pending'))

    if old is not None and not app.is_stopped():
        title = 'release %d was started again, but' % old.number
        if attempt(title, check_health, old, engine_of(app, old), HEALTH_TIMEOUT, 0):
            step('Release %d runs as before', old.number)

def finish(app, release, git_moves_branch, is_settled=False):
    """What follows the commit point. git_moves_branch: when this push is over;
    is_settled: whether docker or init starts it by itself already"""
    try:
        remove_file(app.folder('stopped'))
        if not is_settled:
            engine_of(app, release).settle(release)
        stop_others(app, release)
        if not git_moves_branch and app.has_history(release.commit):
            branch = 'refs/heads/' + release.branch
            app.git('update-ref', branch, release.commit)

        if release.seconds is None:
            took = max(0, round(app.host.clock.time() - release.time, 1))
            app.save_record(release._replace(seconds=took))
        app.save_config(release.config)     # of a rollback, it goes back with the release
        pending = app.linked('pending')
        if pending is not None and pending.number == release.number:
            remove_file(app.folder('pending'))
    except (Failure, EnvironmentError) as error:
        say('dockhand: %s is live, but: %s; `dockhand recover` tries again', app.name,
            error)

def stop_others(app, live):
    """Stop what still runs of the app's earlier releases, once it is drained."""
    others = [release for release in app.kept() if release.number != live.number]
    for kind in ENGINES:
        engine = kind(app)
        theirs = [release for release in others
                  if type(engine_of(app, release)) is kind]
        for release in engine.running(theirs):
            app.nginx.drain(engine.places(release))
            engine.stop(release)

# ---- Keeping: what is removed, and when ------------------------------------------------
# A release that failed leaves its number and why; old ones go. Only what the store names
# is ours to remove.

def forget(app, release, check_names=None, reason=None):
    """Clean up after a release that did not become live: its number and why remain.
    check_names: of one that was not written down yet, a function that raises Failure
    where docker has something of its names, which is not ours: then nothing remains
    reason: without one, it is the error that is being undone"""
    why = printable(reason or str(sys.exc_info()[1]), 300)
    live = app.live()
    is_live = live is not None and live.number == release.number
    if is_live or app.linked('pending'):
        return                                  # or it is not over yet

    try:
        if release.number in app.numbers():
            note_layers_below(app, live, release)
            release = app.load(release.number)  # with all that its build found out
            drop(app, release, '--no-prune')    # the mended push builds on what is there
        elif check_names:                       # docker was told nothing of it yet
            check_names()
        app.save(release._replace(failed=why, job='', proxy='', crontab='', config={},
                                  addresses=[], machines=[], published=0))
        if live is None:
            remove_file(app.folder('live'))
            clean_up_failed(app)
    except Failure:
        return          # docker has gone, or the disk is full: a later command does

def note_layers_below(app, live, release):
    """Note the topmost layer that the image of a release stands on, before that goes:
    docker forgets with it which it was. live: whose image it may be"""
    noted = app.load(release.number)
    is_built = noted.image or noted.layers
    is_lives = live is not None and release.image == live.image
    if is_lives or not is_built:
        return
    images = app.docker.inspect(image_tag(release))
    if not images or not images[0].get('Parent'):
        return

    below = images[0]['Parent'].rpartition(':')[2][:12]     # as a build prints it
    app.save_record(noted._replace(layers=noted.layers + [below]))

def drop(app, release, *options):
    """Take a release's container, image and commit away; False if the image is used.
    options: of `docker rmi`"""
    engine_of(app, release).remove(release)
    write_or_remove(app.host.path(cron_script_path(app.name, release.number)), None)
    if not app.docker.untag(image_tag(release), *options):
        return False
    if app.host.account() is not None:          # else nobody has the repository any more
        app.git('update-ref', '-d', HELD_REF % release.number, act=app.host.ask)
    return True

def remove_records(app):
    """Remove what the store has of an app without a release, but for its config, and
    that it is to have https."""
    parts = ['']                    # all of the app's folder
    if app.config() or app.host.certificates.is_on(app.name):
        parts = ['releases', 'env', 'live']
    app.host.run(['rm', '-rf', '--'] + [app.folder(part) for part in parts])

def clean_up(app, live):
    """Remove what is older than the last releases; only what the store names is ours."""
    if app.linked('pending'):
        return
    kept = set(release.number for release in worth_keeping(app.kept()))
    kept.add(live.number)           # where its record was not finished, it is not yet
    others = [release for release in map(app.load, app.numbers())
              if release.number != live.number]

    clean_up_failed(app)
    leaving = [release for release in others
               if not release.failed and release.number not in kept]
    staying = [release for release in others + [live] if release not in leaving]
    if app.host.certificates.are_any():
        give_certificates_back(app, certified_names(leaving), staying)
    for release in leaving:
        remove_release(app, release)
    clean_up_layers(app, others)    # the images that are gone may have held some

def certified_names(releases):
    """The names of some releases that there may be certificates for, as a set."""
    return set(name for release in releases
               for name in names_for_https(release.proxy or ''))

def full_names(app):
    """The full names of an app, before its first push those of its config."""
    live = app.live()
    if live is None:
        return noted_names(app)
    return names_for_https(live.proxy or '')

def noted_names(app):
    """The full names that config has for an app, whose own file may have others."""
    domains = app.config().get('domains', '').split()
    return [name for name in domains if is_full_name(name)]

def give_certificates_back(app, names, staying=()):
    """Remove the certificates for names that an app has no more: certbot would renew them
    for ever. staying: [Release] of the app that have theirs yet"""
    certificates = app.host.certificates
    leaving = set(name for name in names if certificates.has_anything(name))
    if not leaving:
        return

    leaving -= certified_names(staying)
    for other in list_apps(app.host):
        if other != app.name:
            leaving.difference_update(full_names(App(app.host, other)))
    for name in sorted(leaving):
        if certificates.has_certificate(name):      # else there was but a failed try
            step('%s has no release with the name %s any more: its certificate goes',
                 app.name, name)
        attempt('the certificate of %s stays' % name, certificates.give_back, name)

def one_offs(app):
    """{name of the container of a one-off command: whether its dockhand is there}."""
    found = {}
    for name in list_folder(app.folder('runs')):
        if re.match(RUN_NAME, name):
            mark = read_file(app.folder('runs', name)) or ''
            found[name] = is_attended(app.host, mark)
    return found

def end_one_offs(app, names):
    """End one-off commands for good."""
    for name in names:
        app.docker.remove_containers([name], '-v')
        remove_file(app.folder('runs', name))

def worth_keeping(releases):
    """Those of the last images, and of one image the newest alone, so that changes of
    config do not push the way back out. releases: [Release] in the order of `kept`"""
    images = []                     # in the order in which they were live last
    kept = []
    for release in releases:
        if release.image not in images:
            images.append(release.image)

        alike = [other for other in kept if other.image == release.image]
        if release.image in images[:KEPT] and len(alike) < KEPT_ALIKE:
            kept.append(release)
    return kept

def clean_up_layers(app, releases):
    """Remove what builds of releases that are not live have made on the way. What may be
    there yet stays noted."""
    layers = [layer for release in releases for layer in release.layers]
    left = remove_unneeded(app, layers)

    numbers = app.numbers()
    for release in releases:
        noted = [layer for layer in release.layers if layer in left]
        if noted != release.layers and release.number in numbers:
            app.save_record(release._replace(layers=noted))

def remove_unneeded(app, layers):
    """Remove what builds of an app made on the way, [id], but for what its live release
    has, or that of another app, which may be built alike. Gives those that may be there
    yet."""
    if not layers:
        return []

    needed = set()
    for name in list_apps(app.host):
        live = App(app.host, name).live()
        if live is not None:
            needed.update(live.layers)
    return app.docker.remove_layers([layer for layer in layers if layer not in needed])

def clean_up_failed(app):
    """Remove the records of releases that failed long ago."""
    for number in app.numbers()[:-LISTED]:
        release = app.load(number)
        if release.failed:
            remove_unneeded(app, release.layers)
            remove_release(app, release)

def remove_release(app, release):
    """Remove an old release, but not the image of somebody's container."""
    images = app.docker.images_folder()
    free = free_bytes(app.host, images)
    written = []
    for name in engine_of(app, release).names_taken(release):
        written += app.docker.written_files(name)
    if not drop(app, release):
        return step('Release %d stays: a container uses its image', release.number)

    app.host.run(['rm', '-rf', '--', app.release_folder(release.number)])
    freed = max(0, free_bytes(app.host, images) - free) / 1e6
    step('Release %d is removed, %.1f MB freed', release.number, freed)
    if written:
        detail('with what it wrote outside volumes: ' + ' '.join(written[:5]))

def remove_app(app, live, volumes=()):
    """Remove all that there is of an app, with some of its volumes. live: may be None"""
    remove_crontab(app)
    for name in list_folder(app.host.path(CRON_LOCKS)):
        if name.startswith(app.name + '--'):
            remove_file(app.host.path(CRON_LOCKS, name))
    end_one_offs(app, sorted(one_offs(app)))
    if live is not None:
        engine = engine_of(app, live)
        engine.stop(live)
        app.nginx.remove(app.name)
        engine.withdraw(live)
        app.docker.untag(latest_tag(app))

    for link in ('live', 'pending'):
        remove_file(app.folder(link))
    releases = [app.load(number) for number in app.numbers()]
    names = certified_names(releases) | set(noted_names(app))
    layers = []
    for release in releases:
        layers.extend(release.layers)
        drop(app, release)
    remove_unneeded(app, layers)
    app.nginx.remove_logs(releases)
    give_certificates_back(app, names)
    remove_file(app.host.path(app.host.certificates.own_path(app.name)))
    if volumes:
        app.host.run_unless('no such volume', ['docker', 'volume', 'rm'] + list(volumes))
    app.docker.untag(app.name + ':plan')
    app.host.run(['rm', '-rf', '--', app.repository()], account=app.host.account())
    app.host.run(['rm', '-rf', '--', app.folder(),
                  app.host.path('/var/cache/nginx', app.name)])

    others = [App(app.host, name) for name in list_apps(app.host)]
    if not any(other.live() for other in others):
        app.docker.remove_network()

# ---- Recovering: what a crash left -----------------------------------------------------
# Every command on an app begins here, under its lock: what was interrupted is finished or
# undone by the functions of "Switching" and "Keeping".

@contextmanager
def app_lock(app, purpose, git_moves_branch=False):
    """Hold an app's lock, what a crash left put right; gives the live Release or None.
    git_moves_branch: it may, at the end of this push; else it is set to what is live"""
    with locked(app.host.path(LOCKS, check_app_name(app.name)), purpose):
        recover_app(app, git_moves_branch)
        yield app.live()

@contextmanager
def live_app(app, verb):
    """The same for a command that wants an app that is live."""
    with app_lock(app, 'dockhand %s %s' % (verb, app.name)):
        yield app.must_be_live()

def recover_app(app, git_moves_branch=False):
    """Finish or undo what a crash left of a deploy; under the app's lock."""
    sweep(app)
    begun = one_offs(app)
    end_one_offs(app, [name for name in sorted(begun) if not begun[name]])
    pending = app.linked('pending')
    if pending is not None:
        step('%s: the switch to release %d was interrupted', app.name, pending.number)
        log('%s: the switch to release %d was interrupted', app.name, pending.number)
        live = app.live()
        end_launches(app, pending)
        put_back(app, live, pending, git_moves_branch)
        is_live = live is not None and live.number == pending.number
        if pending.seconds is None and not is_live:
            forget(app, pending, reason='interrupted')

    if os.path.exists(app.folder('exporting')):
        start_again(app)
    for number in reversed(app.numbers()):      # of builds that did not come so far
        release = app.load(number)
        if release.seconds is not None or release.failed is not None:
            break
        forget(app, release, reason='interrupted')
    if os.path.exists(app.folder('importing')):
        end_import(app)
    if app.name in list_apps(app.host) and not app.numbers():
        remove_records(app)

def end_launches(app, release):
    """End a `docker run` that goes on alone since its dockhand was killed: after all is
    put back it would start what nobody wants any more."""
    launches = [['docker', 'run', '--name', process.name]
                for process in engine_of(app, release).own(release)]
    for pid, title in children(app.host, '1').items():
        if title.split('\0')[:4] in launches:
            send_signal(pid, signal.SIGKILL)

def start_again(app):
    """Start an app that was stopped while its volumes were copied."""
    live = app.must_be_live()
    engine = engine_of(app, live)
    engine.end_stops(live)
    engine.place(live)
    engine.start(live)
    engine.settle(live)
    remove_file(app.folder('exporting'))

def end_import(app):
    """Take away what an import brought of an app that is not live; bring it to its end
    where it is."""
    live = app.live()
    moved = read_json(app.folder('importing'))
    if live is None:
        step('%s: its import was interrupted, and is undone', app.name)
        there = app.docker.volumes()
        return remove_app(app, None, [name for name in moved.get('volumes', [])
                                      if name in there])
    if moved.get('stopped'):
        stop_live(app, live)
    remove_file(app.folder('importing'))

def sweep(app):
    """Remove the temporary files and the build folder of a command that was killed."""
    host = app.host
    written = [app.folder(name)
               for name in '''live pending stopped config env https exporting
                              importing'''.split()]
    written += [host.path(folder, app.name + '.conf')
                for folder in (JOBS, PROXIES, NGINX)]
    written.append(host.path(proxy_path(app.name) + TRIAL))
    for number in app.numbers():
        folder = app.release_folder(number)
        written += [folder + '/release.json', folder + '/cron']
    written.append(host.path(JOBS, app.name + '.override'))
    written.append(host.path(cron_path(app.name)))
    for path in written:
        remove_file(temporary_of(path))

    remove_file(app.docker.trial_file(app.name))
    app.remove_git_file('index.lock')
    if os.path.lexists(app.build_folder()):
        app.empty_build_folder()
        app.docker.untag(app.name + ':plan')

def put_right(app):
    """For one app: what a crash left, and what is gone of its live release."""
    with app_lock(app, 'dockhand recover') as live:
        refuse_if(app.linked('pending'), 'it could not be put back')
        if live is not None:
            bring_back(app, live)
            mend_commit(app, live)

def mend_commit(app, live):
    """Where the live commit is none but an annotated tag, which older versions took: git
    never moves a branch to it. Write down the commit that it names, move the branch."""
    kind = app.git('cat-file', '-t', live.commit, act=app.host.ask).out.strip()
    if kind == 'tag':
        named = app.git('rev-parse', '-q', '--verify', live.commit + '^{}').strip()
        step('%s: %s is a tag; its commit is %s', app.name, live.commit[:10], named[:10])
        app.save_record(live._replace(commit=named))
        app.git('update-ref', 'refs/heads/' + live.branch, named)

def bring_back(app, live):
    """Bring back what is gone of a live release: tags, files, its container."""
    engine = engine_of(app, live)
    bring_tags_back(app, live)
    if is_proxy_wrong(app, live):
        step('%s: installing its proxy file again', app.name)
        app.nginx.restore(app.name, app.wanted_proxy(live))
    if is_crontab_gone(app, live):
        step('%s: installing its crontab again', app.name)
        place_crontab(app, live)
    write_cron_script(app, live)        # other machines may have come, or gone

    if app.is_stopped():
        engine.stop(live)
        turn_proxy(app, live, app.proxy_when_stopped(live))
    elif engine.revives(live):
        engine.end_stops(live)
        down = down_part(engine, live)
        if down is not None:
            what = 'release %d' % live.number
            if down.part is not None:
                what = ' '.join(map(title_of, processes_of(down))) + ' of ' + what
            step('%s: %s did not run; starting it', app.name, what)
            log('%s: %s did not run: recover starts it', app.name, what)
            engine.stop(down)       # what is left of it holds its port and its name
            engine.place(live)
            engine.start(down)
        engine.settle(live)

def down_part(engine, live):
    """The part of a live release that does not run, all of it, or None. What runs is left
    alone."""
    if engine.state(live).alive is not False:
        return None
    processes = processes_of(live)
    down = [process.name for process in processes
            if engine.state(part_of(live, [process.name])).alive is False]
    return part_of(live, down) if down and len(down) < len(processes) else live

def holds_ours(app, live):
    """Whether conf.d has the proxy file of a live release, open or closed, or none: not
    one that a person has changed."""
    text = read_file(app.host.path(proxy_path(app.name)))
    if text is None:
        return True
    return without_https(text) in (live.proxy, app.proxy_when_stopped(live))

def is_proxy_wrong(app, live):
    """Whether a live release's proxy file is gone, or in the form of the other state, as
    a crash leaves it, or names other certificates than there are."""
    wanted = app.nginx.form(app.name, app.wanted_proxy(live))
    if not wanted or app.host.text(proxy_path(app.name)) == wanted:
        return False
    return holds_ours(app, live)

def is_crontab_gone(app, live):
    """Whether a live release brings a crontab, and a file of the two for it is gone."""
    paths = [cron_path(app.name), cron_script_path(app.name, live.number)]
    here = [os.path.exists(app.host.path(path)) for path in paths]
    return bool(live.crontab) and not all(here)

def turn_proxy(app, live, text):
    """Have nginx take up a form of a made proxy file, even where that lies there: a
    crash, or a reload that failed, may have come before nginx followed."""
    if is_made(live) and holds_ours(app, live):
        app.nginx.restore(app.name, text)

def stop_live(app, live):
    """Stop a live release, until a person starts it."""
    replace_file(app.folder('stopped'), '')
    attempt('nginx goes on passing requests to it', turn_proxy, app, live,
            app.proxy_when_stopped(live))
    engine_of(app, live).stop(live)

def bring_tags_back(app, live):
    """Give the image of a live release its two tags again; Failure where it is gone."""
    tags = [image_tag(live), latest_tag(app)]
    if [image['Id'] for image in app.docker.inspect(*tags)] == [live.image] * 2:
        return

    for tag in tags:
        if [image['Id'] for image in app.docker.inspect(tag)] == [live.image]:
            continue
        refuse_if(not app.docker.inspect(live.image), 'the image of release %d is gone: '
                  'sudo dockhand rebuild %s', live.number, app.name)
        step('%s: tagging release %d as %s again', app.name, live.number, tag)
        app.docker.tag(live.image, tag)

# ---- What the pusher is told -----------------------------------------------------------
# Texts about releases, and where an app answers. Nothing is changed.

def diff_text(old, new, old_name, new_name):
    """What differs between two texts, as `diff -u` shows it; '' where nothing does."""
    import difflib
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), old_name, new_name,
                                 lineterm='')
    return '\n'.join(line.rstrip('\r\n') for line in lines)

def ports_text(release):
    """Where it listens: for a job, what it publishes."""
    if release.job:
        return ', '.join(published_ports(job_of(release))) or 'none'
    if release.machines:
        return '%d of %s' % (release.published, ' '.join(release.machines))
    return '%s on %s' % (release.port or 'none', ' '.join(release.addresses))

def kind_text(release):
    """What a plain app is, and how to change that."""
    if release.web:
        return ('a web app: nginx passes requests to its port %d (another: dockhand '
                'config %s port=N)' % (release.port, release.app))

    if not release.port:
        return ('a worker without a port (a web app has an EXPOSE in its Dockerfile, or '
                'a `web` in its Procfile)')
    if '.' in release.app:
        return ('a service on port %d that no other app can reach by its name, for the '
                'dot in it' % release.port)
    return 'a service that other apps reach as %s:%d, and nginx does not' % (
        release.app, release.port)

def origin_text(commit, by, time):
    """Which commit, when, by whom: columns of a table."""
    return '%s  %s  %-10s' % (commit[:10], time_text(time), by)

def live_since(live):
    """{'by': who, 'time': when} of what made a release live the last time."""
    return live.revived or {'by': live.by, 'time': live.time}

def live_text(live):
    since = live_since(live)
    return '%s is live since %s, by %s' % (live.commit[:10], time_text(since['time']),
                                           since['by'])

def time_text(seconds):
    """A moment, in seconds since 1970, to the minute."""
    return time.strftime('%Y-%m-%d %H:%M', time.localtime(seconds))

# Where a web app answers. name: a full host name, `NAME.*` for NAME in every domain, or
# '' for every name; port: a str; is_tls: whether by https
Site = namedtuple('Site', 'name port is_tls')

def site_of(release, secured=()):
    """The Site of an app that says most, or None. secured: the names that have https"""
    for server in servers_of(release.proxy or ''):
        listens = [listen for listen in server.listens if listen.address in ALL]
        names = [name for name in server.names
                 if re.match(r'[a-z0-9][a-z0-9._-]*(\.\*)?\Z', name)]
        if any(listen.default for listen in listens):
            names.append('')

        if names and listens:
            port = listens[0].port
            with_tls = [listen.port for listen in listens if 'ssl' in listen.words]
            is_tls = port == '443' or port in with_tls
            name = min(names, key=lambda each: (vagueness(each), each not in secured))
            if name in secured:
                return Site(name, '443', True)
            return Site(name, port, is_tls)
    return None

def vagueness(name):
    """Orders the names of a server: a full one says most, then '', which is every name,
    then `NAME.*`, then a mere `NAME`."""
    if is_full(name):
        return 0
    if not name:
        return 1
    return 2 if name.endswith('*') else 3

def is_full(name):
    """Whether the name of a Site can stand in DNS as it is."""
    return '.' in name and not name.endswith('*')

def address_text(release, address, secured=()):
    """The address that a person would type for a web app; of another app, its ports.
    address: of this server; secured: as site_of wants it"""
    site = site_of(release, secured)
    if site is None:
        return 'ports ' + ports_text(release) if release.job else '-'

    if is_full(site.name):
        return url_text(site.name, site)
    if not site.name:
        return url_text(in_url(address), site)
    return curl_text(site, address)

def url_text(host_name, site):
    """The URL of a Site under a host name, or an address as it stands in one."""
    scheme, usual = ('https', '443') if site.is_tls else ('http', '80')
    port = '' if site.port == usual else ':' + site.port
    return '%s://%s%s/' % (scheme, host_name, port)

def in_url(address):
    """An address as it stands in a URL."""
    return '[%s]' % address if ':' in address else address

def curl_text(site, address):
    """How to ask an address for a Site whose name does not lead there."""
    if site.is_tls:
        return 'curl --resolve %s:%s:%s %s' % (site.name, site.port, in_url(address),
                                               url_text(site.name, site))
    return "curl -H 'Host: %s' %s" % (bare_name(site), url_text(in_url(address), site))

def bare_name(site):
    """A host name that a Site answers to."""
    return site.name[:-len('.*')] if site.name.endswith('.*') else site.name

def show_address(app, release, connection):
    """Tell where an app answers; it is asked through nginx first. connection: that of
    whoever pushed, None where it is not known"""
    address = web_address(connection)
    secured = app.host.certificates.secured(app.name, release.proxy or '')
    site = site_of(release, secured)
    if site is None and not release.job:
        return                          # what else it is was said where that was new
    if site is not None and is_full(site.name):
        show_name(app, release, site, address)
        return offer_https(app, release)
    if site is None or site.is_tls:
        return step('%s: %s', app.name, address_text(release, address or 'HOST'))

    if site.name.endswith('.*') and address and show_link(app, site, address):
        return
    name = bare_name(site) or in_url(address or '127.0.0.1')
    status = fetch_status(app.host, name, int(site.port))
    step('%s answers %s: %s', app.name, status, address_text(release, address or 'HOST'))
    is_first = len(app.kept()) == 1
    if is_first and site.name.endswith('.*') and is_made(release):
        detail('for a browser, point %s.ANYTHING here in DNS; another name: sudo '
               'dockhand config %s domains="NAME"', app.name, app.name)

def show_link(app, site, address):
    """The same by a link that opens for whoever can reach an address; False where the
    server cannot look it up. sslip.io is a public service: it answers each name in it
    with the address that is in the name."""
    link = '%s.%s.sslip.io' % (bare_name(site), re.sub('[.:]', '-', address))
    if address not in resolve(app.host, link):
        return False

    status = fetch_status(app.host, link, int(site.port), 3, address)
    if status.isdigit():
        step('%s: %s answers %s', app.name, url_text(link, site), status)
    return status.isdigit()

def show_name(app, release, site, address):
    """The same for a Site with a full host name: does that lead here?"""
    if site.is_tls and not SPEAKS_TLS:
        return step('%s: %s', app.name, url_text(site.name, site))
    status = fetch_status(app.host, site.name, int(site.port), is_tls=site.is_tls)
    port = '80' if site.is_tls else site.port
    elsewhere = where_it_leads(app, release.proxy, site.name, int(port))
    if not elsewhere:
        return step('%s: %s answers %s', app.name, url_text(site.name, site), status)

    step('%s answers %s: %s', app.name, status, curl_text(site, address or 'HOST'))
    detail('%s leads %s: point it here in DNS', site.name, elsewhere)

def offer_https(app, release):
    """Say how to get https, where a full name is new and has none."""
    names = set(names_for_https(release.proxy))
    if not names or app.host.certificates.is_on(app.name):
        return
    if not names <= certified_names(app.kept()[1:2]):       # the one that was live before
        detail('https: sudo dockhand https %s', app.name)

def where_it_leads(app, text, name, port=80):
    """Where a host name leads, in words; '' where that is this nginx, perhaps by way of a
    router or a cache, and where that cannot be told. text: the app's proxy file"""
    own = app.host.ask(['hostname', '-I']).out.split()
    there = resolve(app.host, name)
    if not there:
        return 'nowhere yet'
    if set(there) & set(own):
        return ''

    address = there[0]
    try:
        head = fetch_head(app.host, name, port, 3, address, TOKEN_PATH)
    except EnvironmentError:
        # Most routers do not let those behind them in by their outer address.
        alike = [each for each in own if (':' in each) == (':' in address)]
        is_behind_router = alike and all(is_private(each) for each in alike)
        return '' if is_behind_router and not is_private(address) else 'to ' + address
    return '' if may_be_ours(app, text, head) else 'to ' + address

def may_be_ours(app, text, head):
    """Whether the head of an answer at TOKEN_PATH is, or may be, this nginx's.
    text: the app's proxy file"""
    token = app.nginx.token()
    told = re.findall(r'(?im)^x-dockhand:\s*(\w+)', head)
    if token and token in told:
        return True
    status = status_in(head)
    if status.startswith('3'):          # by https it may be
        return True

    # An add_header of the app's own takes the place of ours.
    names = [directive.words[0]
             for directive in all_directives(NginxReader(text).directives)]
    would_tell = token and app.nginx.version() >= ADD_ALWAYS and 'add_header' not in names
    return status.isdigit() and not would_tell

def resolve(host, name):
    """The addresses of a host name, as [str]."""
    found = host.ask(['timeout', '2', 'getent', 'ahosts', name]).out.splitlines()
    return [line.split()[0] for line in found if line.split()]

def show_plan(app, live, release, size):
    """What a push of this would change, beside what is live, if anything is.
    size: of its image, in bytes"""
    step('What a push of this would change:')
    now = plan_texts(release)
    was = dict(dict.fromkeys(now, ''), ports='none')
    if live is not None:
        was = plan_texts(moved_to(live, release))

    for name in ('upstart.conf', 'Procfile', 'nginx-proxy.conf', 'crontab', 'ports'):
        diff = diff_text(was[name], now[name], 'live/' + name, 'new/' + name)
        if was[name] or now[name]:
            detail(diff or name + ': no change')
    if live is not None:
        detail('image: %s', 'no change' if was['image'] == now['image'] else 'another')

    gap = 'one stop and one start of the service'
    if live is None or engine_of(app, release).overlaps(live, release):
        gap = 'none'
    detail('gap: %s\nspace: the image has %.1f MB, %.0f MB are free', gap, size / 1e6,
           free_bytes(app.host, STATE) / 1e6)

def moved_to(live, release):
    """A live Release as it would be at the places of another: each gets its own, which is
    no change that a person made."""
    body, mark, where = (live.proxy or '').partition(MARK)
    for before, after in zip(live.addresses, release.addresses):
        where = where.replace('server %s:' % before, 'server %s:' % after)
    if live.machines and release.machines:
        where = where.replace(':%d ' % live.published, ':%d ' % release.published)
        live = live._replace(published=release.published)
    return live._replace(addresses=release.addresses, proxy=body + mark + where)

def plan_texts(release):
    """What a plan compares of a release: {name: text}."""
    return {'upstart.conf': release.job, 'nginx-proxy.conf': release.proxy,
            'Procfile': release.procfile or '', 'crontab': release.crontab,
            'ports': ports_text(release),
            'image': release.image}

# ---- Https: certificates got, and used -------------------------------------------------
# After a push, in `recover`, and when somebody asks: what an app's names want is got from
# certbot, without the app's lock, and nginx takes it up. Whatever goes wrong is told and
# noted, and no deploy depends on it.

def https_names(app):
    """The names of an app that may have https: full ones, and wildcards that a
    certificate which somebody brought is good for."""
    live = app.live()
    if live is None:
        return noted_names(app)

    own = app.host.certificates.own(app.name)
    brought = own.names if own else []
    names = plain_names(live.proxy or '')
    return [name for name in names
            if is_full_name(name) or is_covered_by(name, brought)]

def wanted_names(app):
    """The full names of an app that wait for certbot's certificate or have it: those that
    no certificate which somebody brought is good for."""
    names = full_names(app)
    own = app.host.certificates.own(app.name)
    if own is not None:
        names = [name for name in names if not is_covered_by(name, own.names)]
    return names

def get_certificates(app, is_asked=False):
    """Get what is missing, and have nginx use it: [(name, why it has none)].
    is_asked: by a person: the authority is asked even where it said no a moment ago, or
    the name leads elsewhere"""
    host = app.host
    certificates = host.certificates
    wanted = wanted_names(app)
    missing = [name for name in wanted if not certificates.is_settled(name)]
    if is_asked:
        missing = [name for name in wanted
                   if name in missing or certificates.is_late(name)]
    if not missing:
        return []

    was_missing = make_folder(host.path(CERTIFICATES), 0o700)
    if was_missing or app.live() is None:   # as long as it is, no authority is let in
        use_certificates(app)
    deadline = host.clock.monotonic() + CERTBOT_TIMEOUT
    lock = host.path(LOCKS, '.https')
    with locked(lock, 'certificates for ' + app.name, CERTBOT_TIMEOUT):
        before = [host.text(certificates.path(name)) for name in missing]
        problems = [(name, get_certificate(app, name, deadline, is_asked))
                    for name in missing]
        after = [host.text(certificates.path(name)) for name in missing]
    if after != before:
        use_certificates(app)
    return [(name, why) for name, why in problems if why]

def get_certificate(app, name, deadline, is_asked):
    """Get the certificate for a name; why there is none, which is noted, or None."""
    certificates = app.host.certificates
    if certificates.copy(name) and not certificates.is_late(name):
        remove_file(certificates.failed_path(name))
        return None                 # what is there is never asked for
    if not is_asked and certificates.is_refused_lately(name):
        return certificates.noted(name)['why']

    why = reason_not_to_order(app, name, deadline, is_asked)
    was_asked = why is None
    if was_asked:
        step('Getting a certificate for %s', name)
        why = certificates.order(name, deadline)
    if why is None:
        log('%s: a certificate for %s', app.name, name)
        return None

    if why == NO_TIME:              # the authority did not say no
        was_asked = False
    if was_asked:
        why = '; '.join([why] + lost_text(app, name))
    certificates.note(name, why, was_asked)
    return why

def reason_not_to_order(app, name, deadline, is_asked):
    """Why the authority need not be asked for a name, since it would say no, and counts
    that; or None."""
    host = app.host
    if host.clock.monotonic() >= deadline:
        return NO_TIME_LEFT
    elsewhere = where_it_leads(app, live_proxy(app), name)
    if elsewhere and not is_asked:
        return 'it leads %s: point it here in DNS' % elsewhere
    if not host.certificates.has_certbot():
        return host.certificates.no_certbot_text()
    if app.live() is None and lost_among(host, name, ['127.0.0.1']):
        return NOT_YET
    return None

def live_proxy(app):
    """The proxy file of what is live, '' where there is none."""
    live = app.live()
    if live is None or not live.proxy:
        return ''
    return live.proxy

def lost_text(app, name):
    """What may keep an authority from our answers for a name: [str]."""
    lost = lost_addresses(app.host, name)
    if lost and answers_challenges(live_proxy(app), name):
        return ['its nginx-proxy.conf has a location for that path: leave it out']
    return [lost] if lost else []

def lost_addresses(host, name):
    """Which of the addresses of a name do not lead to our answers for an authority, in
    words; '' where all do."""
    return lost_among(host, name, sorted(set(resolve(host, name))))

def lost_among(host, name, addresses):
    """The same of some addresses: a file of our own is fetched through each."""
    import binascii
    secret = to_text(binascii.hexlify(os.urandom(16)))
    path = CHALLENGE_PATH + 'dockhand-' + secret
    place = host.path(CHALLENGES + path)
    lost = []

    if not os.path.isdir(os.path.dirname(place)):
        os.makedirs(os.path.dirname(place))
    replace_file(place, secret)
    try:
        for address in addresses:
            said = answer_at(host, name, address, path, to_bytes(secret))
            if said:
                lost.append('%s does not lead here (it answers %s)' % (address, said))
    finally:
        remove_file(place)
        for folder in (os.path.dirname(place), os.path.dirname(os.path.dirname(place))):
            remove_if_empty(folder)
    return ', '.join(lost)

def answer_at(host, name, address, path, wanted):
    """What an address says that does not answer with some bytes, or ''."""
    try:
        answer = fetch_head(host, name, 80, 3, address, path, end=wanted)
    except EnvironmentError as error:
        return 'nothing: %s' % (error.strerror or error)
    return '' if wanted in to_bytes(answer) else status_in(answer)

def use_certificates(app):
    """Have nginx take up the certificates that are there now, in an app's proxy file."""
    with app_lock(app, 'https for ' + app.name) as live:
        if live is None or not live.proxy:
            return app.nginx.refresh()
        check_holds_ours(app, live)
        app.nginx.restore(app.name, app.wanted_proxy(live))

def check_holds_ours(app, live):
    """Failure where a person has changed an app's proxy file. live: may be None"""
    if live is not None and live.proxy:
        refuse_if(not holds_ours(app, live), '%s was changed on the server, and stays as '
                  'it is: see dockhand doctor', proxy_path(app.name))

def get_and_tell(app):
    """After a push, or in recover: get what is missing where https is on."""
    certificates = app.host.certificates
    if not certificates.is_on(app.name):
        return
    for name, why in get_certificates(app):
        if certificates.is_there(certificates.path(name)):
            step('https: nothing renews the certificate of %s: %s', name, why)
        else:
            step('https: %s has no certificate: %s', name, why)
        if certificates.is_refused_lately(name):
            again = certificates.noted(name)['time'] + ORDER_AGAIN
            detail('a push after %s tries again, or now: sudo dockhand https %s',
                   time.strftime('%H:%M', time.localtime(again)), app.name)
        else:
            detail('the next push tries again, or: sudo dockhand https %s', app.name)

    own = certificates.own_path(app.name)
    if certificates.is_there(own):
        ends = own_ends_text(app.host, own)
        if ends:
            step('https: %s: dockhand https %s --cert', ends, app.name)

def own_ends_text(host, path):
    """That a certificate which somebody brought ends soon, in words, or ''."""
    x509 = host.certificates.read(path)
    if x509 is None:
        return path + ' cannot be read: bring another'
    days = host.certificates.days_left(x509)
    if days >= WARN_DAYS:
        return ''
    return 'the certificate that was brought ends on %s: bring another' % (
        time_text(x509.ends))

# ---- Deploying: check, build, plan -----------------------------------------------------
# What a push does as root, up to `apply`. Uses all of the above.

def deploy(app, key, ref, old, new):
    """Decide about one pushed ref and deploy it; Failure refuses it."""
    purpose = 'a push of %s by %s' % (app.name, key)
    with app_lock(app, purpose, git_moves_branch=True) as live:
        branch = app.config().get('branch', live.branch if live else None)
        verdict = judge_ref(ref, new, branch)
        if verdict == 'store':
            check_tag(ref, branch)
            return log('%s: %s is stored: push by %s', app.name, ref, key)

        branch = branch or ref[len('refs/heads/'):]
        release = new_release(app, branch, new, key, plan=verdict == 'plan')
        is_commit = partial(check_is_commit, app, new, ref)
        if verdict == 'plan':
            plan_release(app, live, release, is_commit)
        elif live is not None and live.commit == new:
            is_commit()
        else:
            race = partial(check_race, app, live, branch, old, new)
            told = partial(tell_one_offs, app)
            make_release(app, live, release, [is_commit, race, told])

def check_tag(ref, branch):
    """Failure for a tag called like the branch: `git push REMOTE 1.0:main` makes one in a
    new app, which deploys nothing, and afterwards git finds `main` ambiguous."""
    name = ref[len('refs/tags/'):]
    is_branch = name in deployed_branches(branch) + ('plan',)
    refuse_if(is_branch, 'this would make a tag called %s, which deploys nothing; to '
              'deploy what it names: git push REMOTE TAG^{}:refs/heads/%s', name, name)

def check_is_commit(app, new, ref):
    """Failure unless a branch would point to a commit: git refuses all else afterwards,
    when it would be live already."""
    kind = app.git('cat-file', '-t', new).strip()
    if kind == 'tag':
        refuse_tag(app, new, ref)
    refuse_if(kind != 'commit', 'a %s is no commit, which a branch wants: git push REMOTE'
              ' HEAD:%s', printable(kind), ref)

def refuse_tag(app, tag, ref):
    """Failure for an annotated tag, with its name. That is in the third line of it; what
    follows may be as long as its author likes, and is not read."""
    head = []

    def hear(line):
        head.append(line)
        if len(head) < 3:
            return
        named = re.match(r'tag ([\w./-]+)\Z', line)
        raise Failure('an annotated tag is no commit, which a branch wants: git push '
                      'REMOTE %s^{}:%s', named.group(1) if named else 'TAG', ref)
    app.git('cat-file', 'tag', tag, act=partial(app.host.run, each=hear))

def check_race(app, live, branch, old, new):
    """Failure where somebody else's push came first.

    As a rule the branch is at what is live. Just after another push it is not, but git is
    about to move it: that is waited for. After a crash git never will. Then, if this push
    contains what is live, the branch stays at `old`, since git moves it from there alone;
    if not, it is set to what is live, and the push refused."""
    ref = 'refs/heads/' + branch
    clock = app.host.clock
    tip = app.read_branch(ref)
    if live is not None and live.commit != tip and app.has_history(live.commit):
        deadline = clock.monotonic() + 3
        while tip != live.commit and clock.monotonic() < deadline:
            clock.sleep(0.05)
            tip = app.read_branch(ref)

        if tip != live.commit:
            # A lock that the crash left would keep git from moving it.
            app.remove_git_file(ref + '.lock')
            if not app.is_ancestor(live.commit, new):
                app.git('update-ref', ref, live.commit)
                tip = live.commit

    seen = old if old.strip('0') else ''
    if tip != seen:
        raise Failure('another push went live: pull, then push again (%s)',
                      live_text(live) if live else 'the branch is at %s' % tip[:10])

def new_release(app, branch, commit, by, how='push', plan=False):
    """The next Release of an app, as far as it is known before the build."""
    last = max([0] + app.numbers())
    return Release(app=app.name, number=last + 1, plan=plan, commit=commit, branch=branch,
                   by=by, how=how, time=round(app.host.clock.time(), 2), layers=[],
                   config=app.config())

def make_release(app, live, release, checks=(), options=()):
    """Check, build and apply a new release; Failure leaves everything as it was.
    checks: functions, called before that; options: of `docker build`"""
    clock = app.host.clock
    with beside_git(app, live, release) as check_names:
        for check in checks:
            check()
        app.docker.check_space()
        check_host_names(app)
        begun = clock.monotonic()

        with undone_by(forget, app, release, check_names):
            release, size = build_release(app, live, release, check_names, options)
            app.save(release)
            if release_command(release):
                run_release_command(app, release)
            built = clock.monotonic() - begun
            step('Switching to release %d', release.number)
            report = apply(app, live, release)

    step('Release %d is live: built in %.1f s, %s', release.number, built, report)
    if live is None or live.image != release.image:
        detail('image: %.1f MB', size / 1e6)
    log('%s: release %d of %s is live: %s by %s', app.name, release.number,
        release.commit, release.how, release.by)

def plan_release(app, live, release, check):
    """Build a release, say what it would change, and refuse the push. check: a function,
    called before that"""
    with beside_git(app, live, release) as check_names:
        check()
        app.docker.check_space()
        try:
            release, size = build_release(app, live, release, check_names)
            show_plan(app, live, release, size)
        finally:
            app.docker.untag(image_tag(release))
            remove_unneeded(app, release.layers)

    raise Failure('this was a plan, nothing has changed; to deploy it: git push REMOTE '
                  'HEAD:%s', live.branch if live else DEFAULT_BRANCHES[0])

def check_host_names(app):
    """Failure where the server has something of that name that dockhand did not write."""
    if app.live():
        return
    paths = ['/etc/init.d/' + app.name]
    paths += [folder + '/%s.service' % app.name for folder in UNITS]
    paths += [folder + '/%s.conf' % app.name for folder in (JOBS, PROXIES)]

    for path in paths:
        check_not_foreign(app.host, path, app.name)

@contextmanager
def beside_git(app, live, release):
    """Docker and nginx are asked what a new release will want to know, beside what is
    done inside the `with`, which is git's at first; gives a function that raises Failure
    where docker has one of its names."""
    engine = engine_of(app, release)
    kind = engine.takes_names_of
    names = engine.names_taken(release)
    tags = tags_needed(app, live, release)
    if is_upstart(app.host):        # with a docker, it may be, that knows no kinds
        names, tags, kind = names + tags, [], ()

    with app.docker.inspecting(names, kind) as containers, \
            app.docker.inspecting(tags, IMAGES) as images, app.nginx.asking_version():
        yield partial(check_free, app, [(names, containers), (tags, images)])

def tags_needed(app, live, release):
    """The images that docker may not have before a release is built."""
    tags = []
    if not release.plan:            # that tag may be left of a plan that was killed
        tags.append(image_tag(release))
    if live is None:
        tags.append(latest_tag(app))
    return tags

def check_free(app, answers):
    """Failure where docker has something of one of the names that a release needs.
    answers: [([name], a function that gives what it says of them)]"""
    for names, described in answers:
        for name in names if described() else []:
            refuse_if(app.docker.inspect(name), 'docker has %s already, and not from '
                      'dockhand: rename the app, or remove that', name)

def build_release(app, live, release, check_names, options=()):
    """What complete_release gives of a release, its image built. It is written down
    before docker makes anything: from then on what has its names is dockhand's to remove.
    check_names: a function that raises Failure where docker has one of these"""
    step('Checking %s', release.commit[:10])
    with undone_by(app.empty_build_folder):
        if release.image:
            take_image(app, live, release, check_names)
        else:
            release = build_commit(app, live, release, check_names, options)
        release, image = place_and_describe(app, release)
    return complete_release(app, live, release, image)

def take_image(app, live, release, check_names):
    """Of a change of config: it has the image of the live release."""
    check_config(app, live, release)
    engine_of(app, release).check(release)
    check_names()
    app.save(release)
    with app.docker.tagging(release.image, image_tag(release)):
        app.nginx.files()               # parsed by now for the check that follows

def build_commit(app, live, release, check_names, options):
    """The Release with the files of its commit, and an image built of them."""
    tree = check_out(app, release.commit)
    release, folder = check_commit(app, live, release, tree)
    check_names()
    if not release.plan:
        app.save(release)
    return build_image(app, release, folder, options)

def place_and_describe(app, release):
    """(the Release with its places, its image as docker describes it): beside that
    question is done what is due now, and can be."""
    with app.docker.inspecting([image_tag(release)]) as described:
        app.empty_build_folder()
        if not release.plan:        # git is to keep what a rollback may want
            app.git('update-ref', HELD_REF % release.number, release.commit)
        if not release.job:
            release = take_places(app, release)
        images = described()
    refuse_if(not images, 'the build left no image: does docker buildx build elsewhere?')
    return release, images[0]

def take_places(app, release):
    """The Release of a plain app with addresses of its own, and where it has machines a
    port on them; written down, so that no other takes them (but of a plan)."""
    with host_lock(app.host):
        free = free_addresses(app.host, count_addresses(release))
        release = release._replace(addresses=free, machines=[], published=0)
        release = engine_of(app, release).with_machines(release)
        if not release.plan:
            app.save_record(release)
    return release

def complete_release(app, live, release, image):
    """The Release with its image, and all checked that can be before a switch; and how
    many bytes docker says that the image has. image: as it describes it"""
    settings = native(image.get('Config') or {})
    made = str(image['Id'])
    on_the_way = [layer for layer in release.layers
                  if not made.startswith('sha256:' + layer)]
    release = release._replace(image=made, layers=on_the_way)
    complete = complete_job if release.job else complete_plain
    # docker before 1.10 has both: there `Size` is that of the last layer alone
    size = image.get('VirtualSize') or image['Size']
    return complete(app, live, release, settings), size

def check_out(app, commit):
    """The folder into which the files of a commit were written, as the git user."""
    check_tree(app, commit)
    tree = app.build_folder()
    app.host.run(['mkdir', tree], account=app.host.git_account())
    write_files(app, commit, tree)
    return tree

def check_commit(app, live, release, tree):
    """The Release with the files of its commit, and the folder that they are in; Failure
    where it is refused for one of them. tree: where the commit is checked out"""
    folder = folder_in(tree, release.config.get('folder'))
    if live is not None:
        tell_no_change(app, live, release)
    release = check_files(release, folder)
    check_config(app, live, release)
    if live is not None and live.procfile is None and release.procfile:
        tell_procfile_is_read(app, live)
    engine_of(app, release).check(release)

    if live is not None:
        check_edited(app, live, release)
    if release.crontab:
        check_cron(app, release)
    check_proxy_change(app, release)
    if release.proxy:
        check_pushed_proxy(app, live, release)
    return release, folder

def build_image(app, release, folder, options):
    """The Release with its image built, and what this made on the way.
    options: of `docker build`, before those of the release"""
    step('Building %s', image_tag(release))
    own, env = own_build(release, folder)
    layers = []
    try:
        app.docker.build(folder, image_tag(release), layers, list(options) + own, env,
                         beside=app.nginx.files)    # parsed by now for later checks
    except (Failure, Stopped):
        if release.plan:
            remove_unneeded(app, layers)
        elif layers:                    # the mended push goes on from there
            app.save_record(release._replace(layers=layers))
        raise

    release = release._replace(layers=layers)
    if not release.plan:
        app.save_record(release)        # or a crash would leave them unnoted
    return release

def tell_procfile_is_read(app, live):
    """Say that a Procfile counts which was there before and did not, for older versions
    did not read it."""
    name = os.path.join(live.config.get('folder', ''), 'Procfile')
    there = app.git('cat-file', '-e', '%s:%s' % (live.commit, name), act=app.host.ask)
    if there.status == 0:
        step('Note: the Procfile says from now on what runs; before it was not read')

# What config may not say of an app with a job, which says it itself
NOT_FOR_JOBS = ('overlap', 'options', 'check', 'scale', 'port', 'machines')

def check_config(app, live, release):
    """Failure for what config says and this release cannot have. live: may be None"""
    config = release.config
    check_named(app, config)
    if release.job:
        for key in NOT_FOR_JOBS:
            refuse_if(key in config, '%s is for apps without a job, whose upstart.conf '
                      'says itself what runs: dockhand config %s --unset %s', key,
                      app.name, key)
        lines = sorted(long_variables(release))
        refuse_if(lines and is_upstart(app.host), '%s has several lines, which no job of '
                  'init can have: write it as base64', ''.join(lines[:1]))
        return

    refuse_if(config.get('domains') == 'none' and release.proxy and not is_made(release),
              'domains=none keeps it off nginx: remove nginx-proxy.conf, or dockhand '
              'config %s --unset domains', app.name)
    check_scale(app, live, release)
    if 'options' in config:
        check_options(app, config['options'])

def check_named(app, config):
    """Failure where config's `build` names a variable that config has not."""
    for name in variables_named(build_options(config)):
        refuse_if(name not in variables_of(config), 'build names %s, and config has no '
                  'such variable: dockhand config %s %s=-', name, app.name, name)

def check_scale(app, live, release):
    """Failure where config counts processes that a release has not; of one that has gone
    from the Procfile that is only told."""
    kinds = [kind or 'web' for kind, _ in process_types(release)]
    scale = scale_of(release)
    for kind in sorted(set(scale) - set(kinds)):
        text = 'scale counts %s, and there is no such process, but %s' % (
            kind, ' '.join(kinds))
        before = live.config.get('scale') if live else None
        refuse_if(before != release.config['scale'], text)
        step('Note: %s', text)
    refuse_if(scale.get('web') == 0, 'scale: without a web process nothing answers; to '
              'stop an app: dockhand stop %s', app.name)
    refuse_if(not processes_of(release), 'scale: with this nothing of %s would run',
              app.name)

def check_options(app, text):
    """Failure for words of config's `options` that dockhand or docker does not take, or
    that reach what is not the app's."""
    options = read_options(text)
    for mount in mounts_of(options):
        check_mount(app, mount)
    # An image that nobody has, by its id: docker looks at all else before, and asks no
    # registry for it.
    argv = ['docker', 'create'] + [long_option(option) for option in options]
    result = app.host.ask(argv + ['sha256:' + 64 * '0'])
    said = result.err + result.out
    if 'No such image' not in said:
        app.docker.version()                # is that what is wrong?
        raise Failure('options: %s', last_line(said))

def check_mount(app, mount):
    """Failure for a Mount of what is another app's, or dockhand's."""
    name, dashes, _ = mount.source.partition('--')
    if '/' not in mount.source:
        refuse_if(dashes and name != app.name, 'options: %s is a volume of %s',
                  printable(mount.source), printable(name))
        return

    path = os.path.realpath(app.host.path(os.path.join('/', mount.source)))
    images = app.docker.images_folder()
    for folder in (STATE, LIBRARY, app.host.home(), LOCKS, CRON_LOCKS, images):
        ours = os.path.realpath(app.host.path(folder))
        refuse_if((path + '/').startswith(ours + '/'), 'options: %s is below %s, which '
                  'is no place for an app', printable(mount.source), folder)
        is_above = (ours + '/').startswith(path.rstrip('/') + '/')
        refuse_if(is_above and not mount.is_read_only, 'options: %s holds %s, which is '
                  'no place for an app to write', printable(mount.source), folder)

def check_tree(app, commit):
    """Failure where a commit is too large to be checked out: a few kilobytes of folders,
    each of which is in another one ten times, are a thousand million files for git. What
    lists them is ended at the first that is too many."""
    room = free_bytes(app.host, STATE) - SPACE * 1000000
    limits = TreeLimits(room)
    app.git('ls-tree', '-r', '-t', '-l', commit, act=partial(app.host.run, each=limits))

class TreeLimits(object):
    """Refuses a commit that is too large, at the line of `git ls-tree -r -t -l` that
    makes it so: MODE KIND ID SIZE, a tab and a path. room: in bytes"""
    def __init__(self, room):
        self.room = room
        self.paths = 0
        self.bytes = 0

    def __call__(self, line):
        about, tab, path = line.partition('\t')
        fields = about.split()
        refuse_if(not tab or len(fields) != 4, 'git cannot list this commit: %s',
                  printable(line))
        self.paths += 1
        if fields[3].isdigit():             # a folder has none
            self.bytes += max(int(fields[3]), BLOCK)

        refuse_if(self.paths > MOST_PATHS, 'this commit has more than %d files and '
                  'folders: leave out what the build fetches or makes itself', MOST_PATHS)
        refuse_if(len(path) > LONGEST_PATH, 'a path in this commit is longer than %d '
                  'characters: %s', LONGEST_PATH, printable(path))
        refuse_if(self.bytes > self.room, 'the files of this commit have more than %d MB,'
                  ' so much is not free on %s beside the %d MB for a build',
                  self.room // 1000000, STATE, SPACE)

def write_files(app, commit, folder, patience=CHECKOUT_TIMEOUT):
    """Write the files of a commit into a folder; Failure where that takes so long. git
    tries a pattern of .gitattributes with many `*` on a long name almost for ever."""
    clock = app.host.clock
    deadline = clock.monotonic() + patience
    heard = deque(maxlen=LOG_LINES)

    def hear(line):
        check_time()
        heard.append(line)

    def check_time(*_):
        refuse_if(clock.monotonic() > deadline, 'git took more than %d s to check this '
                  'commit out: see the patterns in its .gitattributes', patience)

    app.git('read-tree', commit)
    act = partial(app.host.ask, each=hear, idle=check_time)
    status = app.git('--work-tree=' + folder, 'checkout-index', '-a', act=act).status
    refuse_if(status, 'git checkout-index failed (%d): %s', status,
              last_line('\n'.join(heard)) or 'it says nothing')

def folder_in(tree, path):
    """The folder of a commit that config's `folder` says, be it None; Failure where it is
    none. No link is followed on the way."""
    if path is None:
        return tree
    check_way(tree, path, 'folder=%s' % path)
    folder = os.path.join(tree, path)
    refuse_if(not os.path.isdir(folder), 'folder=%s: there is no such folder in this '
              'commit (config --next notes it for the next push)', path)
    return folder

def check_way(folder, path, what):
    """Failure where a folder on the way to a pushed file is a link. what: it, in words"""
    for part in path.split('/'):
        folder = os.path.join(folder, part)
        refuse_if(os.path.islink(folder), '%s: `%s` is a link: commit what it leads to',
                  what, part)

def tell_no_change(app, live, release):
    """Say where a push changes nothing in the folder of the app: it is deployed all the
    same."""
    path = release.config.get('folder')
    if path is None or live.config.get('folder') != path or live.commit == release.commit:
        return
    trees = [app.git('rev-parse', '%s:%s' % (commit, path), act=app.host.ask).out
             for commit in (live.commit, release.commit)]
    if trees[0] == trees[1] != '':
        step('Nothing below %s has changed', path)

def own_build(release, folder):
    """([word] of `docker build` that config has, the variables that these name)."""
    words = []
    options = build_options(release.config)
    for option in options:
        value = option.value
        if option.name == 'file':
            value = os.path.join(folder, value)
        if option.name in BUILD_FLAGS and not value:
            words.append('--' + option.name)
        else:
            words.append('--%s=%s' % (option.name, value))

    variables = variables_of(release.config)
    env = dict((name, variables[name]) for name in variables_named(options))
    if any(option.name == 'secret' for option in options):
        env['DOCKER_BUILDKIT'] = '1'            # the older builder knows no secrets
    return words, env

def check_dockerfile(release, folder):
    """Failure where there is no Dockerfile, with what there is instead, and what to
    type."""
    name = dockerfile_of(release.config)
    check_way(folder, os.path.dirname(name), name)
    read_pushed(folder, '.dockerignore')
    read_pushed(folder, name + '.dockerignore')     # docker prefers that
    if read_pushed(folder, name) is not None:
        return

    refuse_if(name != 'Dockerfile', 'no %s in this commit, which config names: dockhand '
              'config %s --next build="-f ..."', name, release.app)
    names = sorted(os.listdir(folder))
    alike = [each for each in names if each.lower() == 'dockerfile']
    refuse_if(alike, 'no Dockerfile in this commit, but `%s`: git mv %s Dockerfile',
              printable(''.join(alike[:1])), printable(''.join(alike[:1])))
    inner = folder_with_dockerfile(folder)
    where = '/'.join(filter(None, [release.config.get('folder'), inner]))
    refuse_if(inner, 'no Dockerfile at the top of this commit, but in `%s`: dockhand '
              'config %s --next folder=%s', printable(where), release.app,
              printable(where))
    named = [each for each in names if 'dockerfile' in each.lower().split('.')]
    refuse_if(named, 'no Dockerfile in this commit, but `%s`: dockhand config %s --next '
              'build="-f %s"', printable(''.join(named[:1])), release.app,
              printable(''.join(named[:1])))

    refuse_if('Procfile' in names, 'a Procfile says what runs, and no Dockerfile in this '
              'commit how to build it: add one')
    raise Failure('no Dockerfile in this commit: it says how to build the app; a compose '
                  'file is not read, push each service by itself')

def folder_with_dockerfile(folder):
    """The path of a folder below one that has a Dockerfile, and that config's `folder`
    takes: of the highest, the first by name; '' where none has."""
    found = []
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != '.']
        inner = os.path.relpath(path, folder)
        if 'Dockerfile' in names and is_folder(inner):
            found.append(inner)
    found.sort(key=lambda path: (path.count('/'), path))
    return ''.join(found[:1])

def check_files(release, folder):
    """The Release with its job and proxy file, as they are installed; Failure by line."""
    check_dockerfile(release, folder)
    job = read_pushed(folder, 'upstart.conf')
    procfile = read_pushed(folder, 'Procfile') or ''
    if procfile:
        refuse_if(job is not None, 'upstart.conf says itself what runs, and so does '
                  'Procfile: remove one of the two')
        parse_procfile(procfile)
    release = release._replace(procfile=procfile)
    proxy = read_pushed(folder, 'nginx-proxy.conf')
    release = release._replace(crontab=read_crontab(folder, job))
    if proxy:                           # it may have been copied from the server
        proxy = without_https(proxy)
        for mark in (HTTPS_BEGIN, HTTPS_END):
            refuse_if(mark in proxy, 'nginx-proxy.conf: leave out the line `%s`, which '
                      'is for what dockhand adds', mark.strip())
    if os.path.lexists(os.path.join(folder, '.gitmodules')):
        step('Note: submodules are not part of a push; their folders are empty')
    if 'filter=lfs' in (read_pushed(folder, '.gitattributes') or ''):
        step('Note: files kept by git LFS are not part of a push; their pointers are')

    proxy = headed(release.app, 'proxy file', proxy) if proxy else ''
    if job is None:
        if proxy:               # until the image is built, its port is not known
            proxy = proxy.partition(MARK)[0]
            proxy += upstream(release.app, [('127.0.0.1', 80)], ())
        return release._replace(job='', proxy=proxy)

    job, old_words = modernize_job(job)
    if old_words:
        step('Written with two dashes, for docker of today: ' + ' '.join(old_words))
    check_job(parse_job(job), release.app)
    return release._replace(job=headed(release.app, 'job', job), proxy=proxy)

def read_crontab(folder, job):
    """The text of a pushed crontab, '' where there is no line in it; Failure by line, and
    beside a job."""
    text = read_pushed(folder, 'crontab')
    if text is None or not parse_crontab(text):
        return ''
    refuse_if(job is not None, 'crontab: it cannot stand beside upstart.conf, which says '
              'itself what runs: leave one of them out')
    return text

def check_cron(app, release):
    """Failure where nothing here would run the crontab of a release, or its name is
    taken; else say what will run it."""
    host = app.host
    problem, remedy = cron_missing(host)
    refuse_if(problem, 'crontab: %s here: %s', problem, remedy)
    check_not_foreign(host, cron_path(app.name), app.name)

    count = len(cron_lines(release))
    step('crontab: %d line%s, by the clock of this server (%s)', count,
         's' if count > 1 else '', zone_of(host))
    if not runs_cron(host):
        step('Warning: cron does not run here: ' + START_CRON)

def read_pushed(folder, name):
    """The text of a pushed file, None where there is none; Failure unless it is plain."""
    path = os.path.join(folder, name)
    if not os.path.lexists(path):
        return None
    refuse_if(os.path.islink(path), '%s is a link: commit a plain file', name)
    refuse_if(not os.path.isfile(path), '%s is a folder: commit a plain file', name)
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), 'rb') as source:
        data = source.read(FILE_LIMIT + 1)

    refuse_if(len(data) > FILE_LIMIT, '%s is larger than %d KB', name, FILE_LIMIT // 1024)
    refuse_if(b'\0' in data, '%s holds a NUL byte: it is no text', name)
    is_read_by_line = name.endswith(('.conf', 'crontab', 'Procfile'))
    refuse_if(data[:3] == BYTE_ORDER_MARK and is_read_by_line,
              '%s:1: begins with a byte order mark: save it without one', name)
    refuse_if(not data.strip() and not name.startswith('.'), '%s is empty', name)
    return to_text(data)

def check_edited(app, live, release):
    """Failure where a file of the live release was changed by hand on the server, unless
    it is as the new one says; where a proxy file leads is not compared."""
    check_crontab_edited(app, live, release)
    proxy = app.wanted_proxy(live)
    installed = [('nginx-proxy.conf', PROXIES, proxy, release.proxy)]
    if is_upstart(app.host):
        installed.append(('upstart.conf', JOBS, live.job, release.job))
    for name, folder, ours, new in installed:
        path = '%s/%s.conf' % (folder, app.name)
        text = read_file(app.host.path(path))
        if not ours or text is None:
            continue
        text = without_https(text)
        # A crash may have come between a stop or a start and the proxy file of that.
        if text in (ours, live.proxy, app.proxy_when_stopped(live)):
            continue

        _, mark, where = ours.partition(MARK)
        wanted = (new or ours).partition(MARK)[0] + mark + where
        if text == wanted:
            continue

        step('%s was changed on the server:', path)
        detail(diff_text(ours, text, 'as pushed', 'on the server'))
        raise Failure('to keep that, commit it in %s and push; to drop it: sudo rm %s, '
                      'and try again', name, path)

def check_crontab_edited(app, live, release):
    """Failure where what cron reads of the live release was changed by hand."""
    ours = render_cron_file(live)
    if not ours:
        return
    path = cron_path(app.name)
    text = read_file(app.host.path(path))
    if text is None or text in (ours, render_cron_file(release)):
        return

    step('%s was changed on the server:', path)
    detail(diff_text(ours, text, 'as pushed', 'on the server'))
    raise Failure('to keep that, commit it in crontab; then, or to drop it: sudo rm %s, '
                  'and try again', path)

def check_pushed_proxy(app, live, release):
    """What else is asked of a proxy file that was pushed: that it stands by itself."""
    if live is None or live.proxy != release.proxy:         # it did when it was pushed
        with host_lock(app.host):
            app.nginx.check_alone(release, app.nginx.files())
    for line, text in proxy_doubts(NginxReader(pushed_part(release)).directives):
        step('nginx-proxy.conf:%d: warning: %s', line, text)

def complete_job(app, live, release, settings):
    """The Release of a job app, its job held against the Config of its image."""
    release = release._replace(port=0, web=False, volumes=[], addresses=[], machines=[],
                               published=0)
    ports = proxied_ports(release.proxy)
    volumes = settings.get('Volumes') or {}
    try:
        doubts = engine_of(app, release).doubts(release, ports, volumes)
    except Failure as error:
        # A newer rule binds pushes alone; check_files has held a pushed job against all.
        if live is None or live.image != release.image:
            raise
        step('Note: %s; the next push will be refused for it', error)
        return release

    for line, text in doubts:
        step('upstart.conf:%d: %s', line, text)
    return release

def complete_plain(app, live, release, settings):
    """The Release of a plain app, which has its places, with what the Config of its image
    and its own say."""
    if is_made(release):
        release = release._replace(proxy='')
    port, web, volumes = read_image(settings, release)
    if live is None and release.how != 'import':
        for name in app.docker.volumes_of(app.name):
            step('Found a volume of an earlier %s: %s', app.name, name)

    release = release._replace(port=port, web=web, volumes=volumes,
                               healthcheck=has_healthcheck(settings, release))
    engine_of(app, release).check_complete(release)
    release = release._replace(proxy=complete_proxy(app, release))

    refuse_if('check' in release.config and not port, 'check is for an app with a port: '
              'dockhand config %s port=N', app.name)
    is_older = live is not None and live.image == release.image
    is_tested_later = is_tested_at_start(app, live, release)
    check_proxy_change(app, first_shown(app, live, release), is_older, is_tested_later)
    if is_older:
        tell_taken_names(app, live, release)
    if live is None or kind_text(live) != kind_text(release):
        step('%s is %s', app.name, kind_text(release))
    return release

def is_tested_at_start(app, live, release):
    """Whether it is soon enough that nginx tests a release's proxy file while its first
    container starts: until then nothing has been done that others feel. A release command
    has run by then, an old release that is not handed over is down, and workers are
    exchanged before nginx turns. What somebody wrote is tested before anything starts."""
    if release.plan or not is_made(release) or release_command(release):
        return False
    if not is_handed_over(app, live, release):
        return False
    return not workers_of(live).part and not workers_of(release).part

def tell_taken_names(app, live, release):
    """Say which full names a change of `domains` takes out of another app's wildcard."""
    files = app.nginx.files()
    before = names_of_config(live)
    claims = []
    for path in sorted(files):
        if app_of_file(path) != app.name:
            claims.extend(claims_of(files[path].servers, path))

    for name in names_of_config(release):
        if name in before:
            continue
        losers = set((owner_text(claim.path, app.known), claim.name)
                     for claim in claims if takes_from(name, claim.name))
        for loser, wildcard in sorted(losers):
            step('Note: %s comes to %s from now on, not to %s, which has %s', name,
                 app.name, loser, printable(wildcard))

def complete_proxy(app, release):
    """The proxy file of a plain app; a web app's leads to it, and may be made here."""
    text = (release.proxy or '').partition(MARK)[0]
    if not release.web:
        return text

    name = app.name
    version = app.nginx.version()
    if not text:
        domains = release.config.get('domains', '%s %s.*' % (name, name))
        text = MADE % (name, name)
        text += render_proxy(name, domains, version, has_ipv6(app.host),
                             release.config.get('trust', ''), log_path(app.host, name),
                             bool(release.machines))
    return text + upstream(name, engine_of(app, release).places(release), version,
                           bool(release.machines))

def with_places_of_now(app, release):
    """A Release that was live before, as it can run now: where on other machines, its
    proxy file leads there."""
    relocated = engine_of(app, release).relocated(release)
    if relocated != release:
        relocated = relocated._replace(proxy=complete_proxy(app, relocated))
        app.save(relocated)
    return relocated

def run_release_command(app, release):
    """Run the release command in the new image: with its volumes and its network, but of
    a job under Upstart nothing but config's variables is known."""
    said, words = release_command(release)
    if 'release' in release.config and 'release' in dict(procfile_of(release)):
        step('Note: config has a release command, that of the Procfile is not run')
    step('Running the release command: %s', said)
    status = engine_of(app, release).run_once(release, words, detail)
    refuse_if(status, 'the release command failed (%d); nothing has changed', status)

# ---- Receiving: serve, the two hooks, and commands -------------------------------------
# Where strangers come in: `serve` runs for sshd as the git user, and checks a key's
# rights. `receive` runs as root for the hooks and for commands, and believes which key it
# is about: whoever has a shell as the git user may deploy.

def serve(host, name, *words):
    """Run by sshd for a key, as the git user: hand a push, clone or fetch over to git,
    and any other command to root. The exit status, where git has not taken the place of
    this process. words: the key's rights"""
    note_use(host, name)
    asked = parse_git_command(os.environ.get('SSH_ORIGINAL_COMMAND', ''))
    if asked is None:
        return hand_to_root(name, words)

    verb, app_name = asked
    check_line(name, words)
    asker = Asker(name, read_rights(words))
    asker.check_reaches(app_name)
    if verb == 'receive-pack':
        asker.check_may(CHANGE, 'git push')

    app = App(host, app_name)
    folder = app.repository()
    env = dict(ENVIRONMENT, HOME=host.home(), DOCKHAND_APP=app_name, DOCKHAND_KEY=name)
    for variable in ('GIT_PROTOCOL', 'SSH_CONNECTION'):
        env[variable] = os.environ.get(variable, '')

    if not os.path.isdir(folder):
        if verb == 'upload-pack':
            raise Failure('no app %s here; a first push makes it', app_name)
        check_host_names(app)
        make_repository(host, folder)
        return receive_first(host, folder, env)
    os.execvpe('git', GIT_SERVES + [verb, folder], env)

def note_use(host, name):
    """Note that a key came, as the git user, for `keys`. Where the disk is full it is
    not."""
    try:
        make_folder(host.path(host.home(), USES), 0o700)
        with open(host.path(host.home(), USES, check_key_name(name)), 'w'):
            pass
    except EnvironmentError:
        pass

def check_line(name, words):
    """Failure where what stands in a key's line is no rights."""
    try:
        check_means_something(words)
    except Failure as problem:
        raise Failure('the key "%s" may do nothing while its line in authorized_keys is '
                      'so: %s', name, problem)

def hand_to_root(name, words):
    """Have root answer a command. What it says is in the environment: sudo writes each
    command line into the system's log, and some have a secret in them."""
    kept = [variable for variable in ASKED if variable in os.environ]
    env = dict(ENVIRONMENT, **dict((variable, os.environ[variable]) for variable in kept))
    os.execvpe('sudo', ['sudo', '-n', RECEIVE, 'command', name] + list(words), env)

# Of refs that are pushed as all or none git asks our hook one by one: the first would be
# live when the next is refused.
GIT_SERVES = ['git', '-c', 'receive.advertiseAtomic=false']

def receive_first(host, folder, env):
    """Hand a first push over to git. Where nothing at all comes in, the repository was
    made for nothing: git of a client with sha256 ids ends when it sees ours."""
    from subprocess import call
    status = call(GIT_SERVES + ['receive-pack', folder], env=env,
                  preexec_fn=partial(become, None))

    if not holds_anything(folder):
        host.run(['rm', '-rf', '--', folder])
        refuse_if(status, 'nothing came in. (A repository with sha256 ids is not taken '
                  'as a new app: git init --object-format=sha1)')
    return status

def holds_anything(folder):
    """Whether a bare repository has, or is just getting, an object or a ref."""
    for place in ('objects', 'objects/pack', 'refs/heads', 'refs/tags'):
        names = set(list_folder(os.path.join(folder, place)))
        if names - set(['info', 'pack']):
            return True
    return os.path.exists(os.path.join(folder, 'packed-refs'))

def make_repository(host, folder):
    """A bare repository with our hooks, there whole or not at all."""
    temporary = '%s.%d' % (folder, os.getpid())
    host.run(['git', '-c', 'init.defaultBranch=main', 'init', '-q', '--bare',
              '--template=' + host.path(TEMPLATE), temporary])
    try:
        os.rename(temporary, folder)
    except OSError:                         # another first push was faster
        host.run(['rm', '-rf', '--', temporary])

def receive(host, what, *words):
    """Run as root for the git user; the exit status, None for 0.
    what: `update` and `post-receive` are a repository's hooks; `command` is what the key
    that is named asks for by ssh, with the words of its line; `check` is nothing, to see
    whether sudo lets it through"""
    if what == 'check':
        return None
    if what == 'command':
        return answer_command(host, check_key_name(''.join(words[:1])), words[1:])
    return receive_push(host, what, *words)

def receive_push(host, hook, name='', key='', *arguments):
    """What a hook of an app's repository asks for. key: the name of who pushes;
    arguments: what git or sshd said"""
    if not name or not key:
        raise Failure('push over ssh, with a key of your own: git@HOST:APP.git')
    check_app_name(name)
    check_key_name(key)
    if hook == 'update' and len(arguments) == 3:
        return receive_update(host, name, key, *arguments)
    if hook == 'post-receive':
        return receive_after_push(host, name, ' '.join(arguments))
    raise Failure(FOR_HOOKS)

FOR_HOOKS = 'this is for the hooks of a repository'

def receive_update(host, app_name, key, ref, old, new):
    """Deploy what the update hook is asked about: a ref, its commit and the new one."""
    if not OBJECT_ID.match(old) or not OBJECT_ID.match(new):
        raise Failure(FOR_HOOKS)
    deploy(App(host, app_name, KeysReach(host, key)), key, ref, old, new)

class KeysReach(object):
    """The apps that whoever pushes with a key may know of: none, where no key is called
    so any more. As a rule a push has to name no other app: authorized_keys is not read
    before one is asked about."""
    def __init__(self, host, key):
        self.host = host
        self.key = key
        self.rights = None

    def __contains__(self, app):
        if self.rights is None:
            self.rights = rights_of(read_keys(self.host), self.key)
        if self.rights is None:
            return False
        return self.rights.apps is None or app in self.rights.apps

def receive_after_push(host, app_name, said):
    """What follows a push. said: the four words of the ssh connection by which it came;
    older hooks say nothing"""
    if not re.match(r'(\S+ \d+ \S+ \d+)?\Z', said):
        raise Failure(FOR_HOOKS)
    after_push(App(host, app_name), parse_connection(said))

def answer_command(host, name, words):
    """Run the command that a key's owner typed behind `ssh git@HOST`. words: of its line,
    as sshd's shell has read them; where no line of that name says the same, the file has
    been changed, or is not as it seems"""
    lines = [key.words for key in read_keys(host) if key.name == name]
    refuse_if(not lines, 'no key here is called "%s"', name)
    refuse_if(words not in lines, 'what the key "%s" may do is not clear from its line '
              'in authorized_keys, or was changed just now: connect again, or have it '
              'uploaded again', name)
    check_line(name, words)
    host.asker = Asker(name, read_rights(words))
    words = split_words(os.environ.get('SSH_ORIGINAL_COMMAND', ''))
    return run_command(host, words) if words else greet(host)

# Who asks for a command over ssh. name: of the key; rights: Rights
class Asker(namedtuple('Asker', 'name rights')):
    def check_reaches(self, app):
        """Failure where an app is none of this key's: it is the same whether there is
        such an app, and found out in the same time."""
        reach = self.rights.apps
        if reach is not None and app not in reach:
            raise Failure('the key "%s" has no right to %s: it may reach %s', self.name,
                          printable(app), ', '.join(reach))

    def may(self, right):
        """Whether the rights go so far. right: READ, CHANGE, ADMIN or ROOT"""
        if right == READ:
            return True
        if right == CHANGE:
            return not self.rights.only_reads
        if right == ADMIN:
            return self.rights.is_admin
        return False                    # nobody is root from afar

    def check_may(self, right, what):
        """Failure where they do not."""
        if self.may(right):
            return
        refuse_if(right == ROOT, '%s is for root, on the server itself', what)
        refuse_if(right == ADMIN, '%s is for keys that were uploaded with --admin', what)
        raise Failure('%s is not for the key "%s", which may only read', what, self.name)

GREETING = '''You are {name}, and {rights}.

  {first}
  ssh git@HOST apps                   what runs here
  ssh git@HOST logs NAME -f           what an app prints

ssh git@HOST help lists all commands.'''
PUSH_FIRST = 'git push git@HOST:NAME HEAD:main    deploys what you have committed as NAME'
CLONE_FIRST = 'git clone git@HOST:NAME             fetches what an app is made of'

def greet(host):
    """Say who somebody is that came without a command, and what comes first."""
    asker = host.asker
    first = PUSH_FIRST if asker.may(CHANGE) else CLONE_FIRST
    tell(GREETING.format(name=asker.name, rights=rights_text(asker.rights), first=first))
    there = seen_apps(host)
    if there:
        tell('\nHere now: %s', ' '.join(there))

def read_keys(host):
    """[Key] of those that are ours in the git user's authorized_keys."""
    text = host.as_git(read_file, host.path(host.home(), KEYS))
    return keys_in(read_authorized_keys(text or ''))

def change_keys(host, change):
    """Make of the lines of authorized_keys what a function makes of them; they are given
    as [KeyLine]."""
    path = host.path(host.home(), KEYS)
    refuse_if(not host.account(), 'dockhand is not installed here: dockhand.py install')
    with locked(host.path(LOCKS, '.keys'), 'a change of keys'):
        lines = change(read_authorized_keys(host.as_git(read_file, path) or ''))
        host.as_git(make_folder, os.path.dirname(path), 0o700)
        host.as_git(replace_file, path, render_authorized_keys(lines), 0o600)
    return lines

def after_push(app, connection):
    """Remove what is too old, say where the app answers. Nothing depends on it: git does
    not run it when the pusher is gone. connection: as show_address wants it"""
    with app_lock(app, 'the clean-up of ' + app.name) as live:
        if live is not None:
            app.git('symbolic-ref', 'HEAD', 'refs/heads/' + live.branch)
            clean_up(app, live)
    if live is not None:
        attempt('https', get_and_tell, app)
        show_address(app, live, connection)

ZERO_INT = b'\0\0\0\0'            # for ioctl to fill; as an answer: nothing is unread

def hang_up(host):
    """End git's process for a pusher who takes nothing any more, or it waits for ever.
    The deploy is over; the same push again is accepted, and moves the branch."""
    from termios import FIONREAD
    unread = fcntl.ioctl(2, FIONREAD, ZERO_INT)
    host.clock.sleep(2 * PATIENCE)
    if unread == ZERO_INT or fcntl.ioctl(2, FIONREAD, ZERO_INT) != unread:
        return                              # somebody reads after all

    pid = os.getppid()
    while pid > 1 and 'receive-pack' not in host.text('/proc', str(pid), 'cmdline'):
        fields = process_fields(host, pid)
        pid = int(fields[1]) if len(fields) > 1 else 0
    if pid > 1:
        send_signal(pid, signal.SIGTERM)

# ---- Logs: what an app prints, over deploys too ----------------------------------------
# Docker keeps a log for each container. Who follows an app goes on to that of the next
# release, and misses nothing that docker still has.

PIECE = 2 ** 14                 # bytes that it keeps as one: a longer line is several
TIME = br'(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z) '
TURN = 0.5                      # seconds until the live release is looked up again

# What was printed at a time, to the end of its line or in pieces. source: where, if there
# are several places
Printed = namedtuple('Printed', 'time text begins source')

class Given(object):
    """How much was given of what one container has printed."""
    def __init__(self):
        self.begins = True      # what comes next is the beginning of a line
        self.last = b''         # the time of what was given last,
        self.at_last = 0        # and how much was given of that time
        self.resumed = b''      # from when on docker was asked once more,
        self.skipped = 0        # and how much of that moment comes again

    def resume(self):
        self.resumed = self.last
        self.skipped = self.at_last

    def is_new(self, moment):
        """Whether what was printed at a moment is new; it is noted as given."""
        if moment < self.resumed:
            return False
        if moment != self.last:
            self.last = moment
            self.at_last = 1
            self.skipped = 0
            return True

        if self.skipped:
            self.skipped -= 1
            return False

        self.at_last += 1
        return True

class LogReader(object):
    """What a container has printed, as `docker logs --timestamps` gives it; it can be
    asked again for what came later.
    title: what is shown before each line, or ''; words: the command that prints it"""
    HEAD = TIME + b'()()'       # what stands before it: also whose it is, and where

    def __init__(self, title, container, words=('docker', 'logs')):
        self.title = title
        self.container = container
        self.words = list(words)
        self.process = None
        self.rest = b''                 # of what came, its last part
        self.given = {}                 # {whose it is: Given}

    def begin(self, *words):
        """Ask for it, with options of `docker logs`; again, from where it was left."""
        from subprocess import PIPE, STDOUT, Popen
        argv = self.words + ['--timestamps'] + list(words)
        if self.given:
            since = min(given.last for given in self.given.values())
            argv.append('--since=' + to_text(since))
        for given in self.given.values():
            given.resume()
        self.rest = b''
        self.process = Popen(argv + [self.container], stdout=PIPE, stderr=STDOUT,
                             close_fds=True, env=ENVIRONMENT)

    def read(self):
        """The [Printed] that has come, which may be none; None at the end."""
        data = os.read(self.process.stdout.fileno(), 65536)
        if not data:
            self.end()
            return None
        return self.split(data)

    def end(self):
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
            self.process.stdout.close()
        self.process = None

    def split(self, data):
        """[Printed] of what docker wrote, but for what was given; what has not come whole
        is put aside."""
        head_at = re.compile(self.HEAD).match
        found = []
        data = self.rest + data
        at = 0
        head = head_at(data, at)
        end = end_of_piece(data, at, head)
        while end:
            if head:                                # else docker itself speaks
                found += self.new_piece(head, data[head.end():end])
            at = end
            head = head_at(data, at)
            end = end_of_piece(data, at, head)

        self.rest = data[at:]
        return found

    def new_piece(self, head, text):
        """[Printed] of a piece, none where that was given. head: the match of HEAD"""
        moment, whose, source = head.groups()
        given = self.given.setdefault(whose, Given())
        begins = given.begins
        given.begins = text.endswith(b'\n')
        if given.is_new(moment):
            return [Printed(moment, text, begins, to_text(source))]
        return []

    def printed(self):
        """Each Printed until its end, by time."""
        for several in iter(self.read, None):
            for each in several:
                yield each

class ServiceReader(LogReader):
    """The same of a service, as `docker service logs` gives it: of each of its containers
    by time, but these in any order."""
    HEAD = TIME + br'(\S+@(\S+)) *\| '

    def printed(self):
        """By time where these are so many at most that came at once."""
        import heapq
        waiting = []
        for number, each in enumerate(LogReader.printed(self)):
            heapq.heappush(waiting, (each.time, number, each))
            if len(waiting) > SORTED:
                yield heapq.heappop(waiting)[-1]
        while waiting:
            yield heapq.heappop(waiting)[-1]

SORTED = 5000                   # lines of a service that are put in order

def end_of_piece(data, at, head):
    """Where what begins at a place of docker's output ends; 0 where that has not come
    yet. head: a match of what stands before it, or None"""
    if not head:
        return data.find(b'\n', at) + 1

    begin = head.end()
    end = data.find(b'\n', begin, begin + PIECE + 1) + 1
    if not end and len(data) > begin + PIECE:
        return begin + PIECE
    return end

def printed_by(reader, number):
    """Each Printed of a reader until its end, so that they can be put in order: by time,
    and of one moment by the reader's number, since readers cannot be compared."""
    for printed in reader.printed():
        yield printed.time, number, printed, reader

def show_printed(printed, reader):
    text = printed.text
    title = '@'.join(filter(None, [reader.title, printed.source]))
    if printed.begins and title:
        text = to_bytes(title + ' | ') + text
    write_whole(text)

def write_whole(data):
    """Write to standard output, however long its reader takes."""
    while data:
        data = data[os.write(1, data):]

def is_hung_up():
    """Whether nobody reads standard output any more."""
    poll = select.poll()
    poll.register(1, 0)
    return bool(poll.poll(0))

def show_logs(readers, words):
    """Print what some containers have printed, by time. words: options of
    `docker logs`"""
    import heapq
    for reader in readers:
        reader.begin(*words)
    all_printed = [printed_by(reader, number) for number, reader in enumerate(readers)]
    for _, _, printed, reader in heapq.merge(*all_printed):
        show_printed(printed, reader)

class Follower(object):
    """Prints what the processes of an app print, of one release after the other, until
    nobody reads that any more.
    title: of the process that is wanted, None for all; readers: of the release that is
    live; begun: the moment since when what they have not given is new"""
    def __init__(self, app, live, title, readers, begun):
        self.app = app
        self.number = live.number
        self.title = title
        self.readers = readers
        self.begun = begun
        self.older = []                 # readers of what was live, until it has ended
        self.known = dict((reader.container, reader) for reader in readers)

    def follow(self):
        for reader in self.readers:
            self.begin(reader)
        try:
            while not is_hung_up() and os.path.isdir(self.app.folder()):
                self.show_some()
                self.look_for_another()
        finally:
            for reader in self.readers + self.older:
                reader.end()

    def begin(self, reader):
        """Have a reader go on from what it gave last. If it gave nothing yet, all is new
        that was printed since we are here: that a container is started docker notes too
        late, when its first lines may have been printed."""
        if reader.given:
            reader.begin('--follow')
        else:
            reader.begin('--follow', '--since=' + self.begun)

    def show_some(self):
        """Print what comes within a turn."""
        followed = dict((reader.process.stdout.fileno(), reader)
                        for reader in self.readers + self.older if reader.process)
        poll = select.poll()
        for fd in followed:
            poll.register(fd, select.POLLIN)
        poll.register(1, 0)             # it ends the turn where nobody reads

        for fd, _ in poll.poll(TURN * 1000):
            reader = followed.get(fd)
            printed_now = reader.read() if reader else None
            for printed in printed_now or []:
                show_printed(printed, reader)
        self.older = [reader for reader in self.older if reader.process]

    def look_for_another(self):
        """Go on to the release that is live now, and to what was started again. What a
        new one has printed is shown, even if it has ended by now."""
        is_new = self.app.linked_number('live') != self.number
        if is_new:
            live = self.app.live()
            if live is None:
                return
            self.turn_to(live)

        ended = dict((reader.container, reader) for reader in self.readers
                     if reader.process is None)
        if not ended:
            return
        for described in self.app.docker.inspect(*ended):
            if 'State' not in described:            # a service, which goes on
                self.begin(ended[described['Spec']['Name']])
            elif is_new or described['State']['Running']:
                self.begin(ended[described['Name'][1:]])
        if not is_new:
            self.app.host.clock.sleep(TURN)

    def turn_to(self, live):
        """Read another release from now on; what was read is read to its end. Where it
        was live before, its readers know what they have given."""
        left = self.readers
        self.number = live.number
        self.readers = [self.known.setdefault(reader.container, reader)
                        for reader in log_readers(self.app, live, self.title)]
        self.older = [reader for reader in self.older + left
                      if reader not in self.readers]

def log_readers(app, live, title):
    """The [LogReader] of a release's processes: those that are called so, or all."""
    readers = []
    engine = engine_of(app, live)
    processes = engine.logged(live)
    for process in processes:
        own_title = title_of(process)
        if title in (None, own_title, process.type or 'web'):
            shown_title = own_title if len(processes) > 1 else ''
            words, name = engine.log_of(process)
            kind = ServiceReader if 'service' in words else LogReader
            readers.append(kind(shown_title, name, words))
    return readers

# ---- One-off commands: run, and enter --------------------------------------------------
# A command of a person's in a container of its own, of the live release, or in one that
# runs. Its dockhand waits for it, and ends it when nobody listens any more.

RUN_NAME = r'/?(.+)--run-[0-9a-f]{8}\Z'
SHELL = 'command -v bash >/dev/null && exec bash; exec sh'
ATTEND = 0.1                    # seconds between two looks at what is attended

def create_one_off(app, live, words, is_terminal):
    """Create the container of a one-off command, under the app's lock; its name. A file
    says of which process it is, so that one whose dockhand is gone is found. words: the
    command, none for a shell"""
    engine = engine_of(app, live)
    options, env, folder = engine.once(live)
    if not live.job:
        app.docker.ensure_network(live.addresses[0])
    name = '%s--run-%s' % (container_name(live), random_id())
    make_folder(app.folder('runs'), 0o700)
    replace_file(app.folder('runs', name), own_mark(app.host))

    argv = ['docker', 'create', '--name', name, '--rm', '--interactive'] + options
    if is_terminal:
        argv.append('--tty')
    if not words:
        argv.append('--entrypoint=sh')
    argv += [live.image] + (words or ['-c', SHELL])
    with undone_by(end_one_offs, app, [name]):
        app.host.run(argv, env=env, cwd=folder)
    return name

def random_id():
    import binascii
    return to_text(binascii.hexlify(os.urandom(4)))

def tell_one_offs(app):
    """Name the one-off commands that go on in the release they were begun in."""
    for name, is_there in sorted(one_offs(app).items()):
        if is_there:
            step('Note: %s goes on, as it was begun', name)

def attend(argv):
    """Run a command with our own standard streams; its exit status. It is ended where
    nobody reads standard output any more: gives None then."""
    from subprocess import Popen
    env = dict(ENVIRONMENT, TERM=os.environ.get('TERM', 'xterm'))
    process = Popen(argv, env=env, close_fds=True)
    try:
        while process.poll() is None:
            if is_hung_up():
                return None
            time.sleep(ATTEND)
        return process.returncode
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()

def run_one_off(app, words, is_terminal):
    """Run a one-off command in a container of its own; its exit status."""
    with live_app(app, 'run') as live:
        name = create_one_off(app, live, words, is_terminal)
    try:
        status = attend(['docker', 'start', '--attach', '--interactive', name])
        if status is None:
            return 1

        # One that ended is gone by --rm. Of one that never began `docker start` says 1,
        # and docker has written down what a shell would say: 126 or 127.
        never_began = app.docker.inspect(name)
        if status and never_began:
            return never_began[0]['State'].get('ExitCode') or status
        return status
    finally:
        end_one_offs(app, [name])

def enter(app, container, words, is_terminal):
    """Run a command in a container that runs; its exit status. What was begun there does
    not end with its client: it is known by a variable."""
    mark = 'DOCKHAND_ENTER=' + random_id()
    argv = ['docker', 'exec', '--interactive', '--env=' + mark]
    if is_terminal:
        argv.append('--tty')

    status = None
    try:
        status = attend(argv + [container] + (words or ['sh', '-c', SHELL]))
        return 1 if status is None else status
    finally:
        if status is None:
            kill_marked(app.host, mark)

def kill_marked(host, mark):
    """Kill the processes that have a variable in their environment."""
    for pid in filter(str.isdigit, os.listdir(host.path('/proc'))):
        try:
            if mark in host.text('/proc', pid, 'environ').split('\0'):
                os.kill(int(pid), signal.SIGKILL)
        except EnvironmentError:        # it has ended by itself
            pass

def has_terminal():
    """Whether a person types here and reads: `ssh -t` gives one too."""
    return os.isatty(0) and os.isatty(1)

# ---- Status: what is so at this moment -------------------------------------------------
# Each kind of thing is described once, as a dict of plain values, for --json and for
# people. Times are seconds since 1970, sizes bytes; None is not known.

DU_PATIENCE = 5                 # seconds for the size of a volume

def describe_app(app, here):
    """What `apps` shows of an app. here: the address of this server"""
    live = app.live()
    found = dict.fromkeys(['release', 'commit', 'by', 'since', 'address', 'why'])
    found.update(app=app.name, state='waiting', processes={})
    if live is None:
        return dict(found, why=app.waiting_text())

    state = engine_of(app, live).state(live)
    held = app.held_for()
    if held and not state.alive:
        found.update(state='changing', why=held)
    elif state.alive:
        found.update(state='running', why=state.past or None)
    elif app.is_stopped():
        found.update(state='stopped')
    else:
        found.update(state='DOWN', why=state.text)
    since = live_since(live)
    secured = app.host.certificates.secured(app.name, live.proxy or '')
    return dict(found, release=live.number, commit=live.commit, by=since['by'],
                since=since['time'], address=address_text(live, here, secured),
                processes=OrderedDict(
                    (kind, count) for kind, _, count in counted_types(live) if kind))

def describe_release(release, live):
    """What `releases` shows of a release. live: the Release that is, or None"""
    return {'release': release.number, 'commit': release.commit, 'by': release.by,
            'time': release.time, 'how': release.how, 'seconds': release.seconds,
            'state': state_of_release(release, live), 'why': release.failed,
            'live_again': live.revived or None if is_same(release, live) else None}

def is_same(release, live):
    return live is not None and release.number == live.number

def state_of_release(release, live):
    if is_same(release, live):
        return 'live'
    if release.failed:
        return 'failed'
    return 'kept' if release.seconds is not None else 'under way'

def describe_key(host, key, used):
    """What `keys` shows of a key. used: when its name came last, or None"""
    rights = read_rights(key.words)
    return {'name': key.name, 'type': key.type, 'used': used,
            'fingerprint': fingerprint(host, key.type, key.blob) or None,
            'apps': rights.apps, 'read_only': rights.only_reads, 'admin': rights.is_admin}

def describe_process(host, process, container):
    """A container that runs, or ran. container: as docker describes it, None if gone"""
    found = dict.fromkeys(['state', 'started', 'restarts', 'memory', 'memory_limit'])
    found['process'] = title_of(process)
    if container is None:
        return dict(found, state='gone')

    state = container_state(container)
    settings = container.get('HostConfig') or {}
    word = state.health if state.alive and state.health else state.text
    found.update(state=word, memory_limit=settings.get('Memory') or None,
                 restarts=container.get('RestartCount') or 0)
    if state.alive:
        found.update(started=read_docker_time(container['State']['StartedAt']),
                     memory=memory_of(host, container['State'].get('Pid')))
    return found

def describe_service(engine, release):
    """The same of what runs on several machines."""
    found = dict.fromkeys(['started', 'restarts', 'memory', 'memory_limit'])
    return dict(found, process='web', state=engine.state(release).text)

def read_docker_time(text):
    """A time that docker says, in seconds since 1970; None for another text."""
    import calendar
    try:
        return calendar.timegm(time.strptime(str(text)[:19], '%Y-%m-%dT%H:%M:%S'))
    except ValueError:
        return None

def memory_of(host, pid):
    """The bytes of memory that a container has now, by its cgroup; where the kernel
    counts none for it, by its processes. pid: of its first process"""
    # A line is NUMBER:CONTROLLER:PATH; the controller of cgroup2 has no name.
    for line in host.text('/proc', str(pid), 'cgroup').splitlines():
        kind, path = line.split(':', 2)[1:]
        name = {'': 'memory.current', 'memory': 'memory.usage_in_bytes'}.get(kind)
        if name is not None:
            count = host.text('/sys/fs/cgroup', kind, path, name).strip()
            if count.isdigit():
                return int(count)

    return resident_bytes(host, str(pid)) or None

def resident_bytes(host, pid):
    """The bytes of memory of a process and of all that it started."""
    found = re.search(r'VmRSS:\s+(\d+) kB', host.text('/proc', pid, 'status'))
    own = int(found.group(1)) * 1024 if found else 0
    return own + sum(resident_bytes(host, child) for child in children(host, pid))

def describe_status(app, here):
    """What `status APP` shows: all of describe_app, and more."""
    host = app.host
    live = app.live()
    found = describe_app(app, here)
    releases = [app.load(number) for number in reversed(app.numbers())]
    releases = [release for release in releases if release.commit]
    failed = [release for release in releases if release.failed]
    found.update(
        subject=None, how=None, containers=[], certificates=[], images=None, volumes=[],
        releases=[describe_release(release, live) for release in releases[:5]],
        refused=describe_release(failed[0], live) if failed else None)
    if live is None:
        return found

    subject = app.git('log', '-1', '--format=%s', live.commit, act=host.ask).out
    found.update(subject=printable(subject.strip(), 60) or None, how=live.how)

    engine = engine_of(app, live)
    processes = engine.own(live)
    there = dict((container['Name'][1:], container) for container in
                 app.docker.inspect(*[process.name for process in processes]))
    found['containers'] = [describe_process(host, process, there.get(process.name))
                           for process in processes]
    if live.machines:
        found['containers'].insert(0, describe_service(engine, front_of(live)))

    kept = set(release.image for release in app.kept() if release.image)
    images = app.docker.inspect(*sorted(kept))
    found['images'] = sum(image.get('Size') or 0 for image in images)
    found['certificates'] = [describe_certificate(app, name) for name in https_names(app)]
    found['volumes'] = [{'name': name, 'bytes': volume_bytes(app, name)}
                        for name in app.docker.volumes_of(app.name)]
    return found

def describe_certificate(app, name):
    """What is so of https for a host name of an app."""
    certificates = app.host.certificates
    for certificate in certificates.of(app.name, [name]):
        x509 = certificates.read(certificate.path)
        if certificates.is_on(app.name) and x509 is not None:
            return {'name': name, 'days': certificates.days_left(x509),
                    'issuer': x509.issuer}
    return {'name': name, 'days': None, 'issuer': None}

def volume_bytes(app, name):
    """How much a volume holds; None where it takes too long to find out."""
    folder = os.path.join(app.docker.images_folder(), 'volumes', name, '_data')
    found = app.host.ask(['timeout', str(DU_PATIENCE), 'du', '-skx', '--',
                          app.host.path(folder)])
    count = found.out.split()[:1]
    return int(count[0]) * 1024 if found.status == 0 and count else None

def describe_server(host):
    """What `status` shows of the server itself."""
    memory = dict(re.findall(r'(?m)^(\w+):\s+(\d+) kB', host.text('/proc/meminfo')))
    folder = os.path.join('/', host.docker.images_folder())
    disk = os.statvfs(host.path(folder))
    names = [name for app in seen_apps(host) for name in https_names(App(host, app))]
    version = host.ask(['docker', 'version', '--format', '{{.Server.Version}}'])
    renewed_names = [name for name in names if host.certificates.is_renewed(name)]
    return {
        'load': [float(word) for word in host.text('/proc/loadavg').split()[:3]],
        'memory': int(memory.get('MemTotal', 0)) * 1024,
        'memory_free': int(memory.get('MemAvailable', memory.get('MemFree', 0))) * 1024,
        'disk': disk.f_blocks * disk.f_frsize, 'disk_free': disk.f_bavail * disk.f_frsize,
        'docker': version.out.strip() or None, 'nginx': host.nginx.master() is not None,
        'certificates': len(renewed_names)}

# For people

def size_text(count):
    """A number of bytes; `?` for None."""
    if count is None:
        return '?'
    units = ['B', 'kB', 'MB', 'GB', 'TB']
    while count >= 1000 and len(units) > 1:
        count /= 1000.0
        units.pop(0)
    is_whole = count >= 10 or units[0] == 'B'
    return '%d %s' % (count, units[0]) if is_whole else '%.1f %s' % (count, units[0])

def span_text(seconds):
    """A length of time in its two largest units: `3 d 2 h`."""
    parts = []
    for unit, size in (('d', 86400), ('h', 3600), ('min', 60), ('s', 1)):
        count = int(seconds // size)
        seconds -= count * size
        if count or parts or unit == 's':
            parts.append('%d %s' % (count, unit))
    return ' '.join(parts[:2])

def app_line(found):
    """A line of `apps`. found: as describe_app gives it"""
    if found['state'] == 'waiting':
        return '%-16s %-8s %s' % (found['app'], 'waiting', found['why'])

    origin = origin_text(found['commit'], found['by'], found['since'])
    said = ['%s %s' % (origin, found['address'])]
    if found['why']:
        said.append(found['why'])
    counts = ['%s=%d' % pair for pair in found['processes'].items()]
    if counts:
        said.append(' '.join(counts))
    return '%-16s %-8s %s' % (found['app'], found['state'], '  '.join(said))

def status_lines(found, now):
    """What `status APP` prints. found: as describe_status gives it"""
    lines = ['%s: %s' % (found['app'], and_then(found['state'], found['why']))]

    def add(title, *texts):
        for text in texts:
            lines.append('  %-12s %s' % (title, text))
            title = ''
    if found['release'] is not None:
        add('release', '%d, %s  %s' % (found['release'], found['commit'][:10],
                                       found['subject'] or ''),
            '%s by %s, %s' % (found['how'], found['by'], time_text(found['since'])))
        add('address', found['address'])
    add('https', *['%s: %s' % (each['name'], 'no' if each['days'] is None else
                               '%d days left, by %s' % (each['days'], each['issuer']))
                   for each in found['certificates']])
    add('processes', *[process_line(each, now) for each in found['containers']])
    if found['images'] is not None:
        add('disk', 'images ' + size_text(found['images']), *[
            'volume %s %s' % (each['name'], size_text(each['bytes']))
            for each in found['volumes']])
    add('releases', *[release_line(each) for each in found['releases']])
    if found['refused']:
        add('refused', '%s: %s' % (time_text(found['refused']['time']),
                                   found['refused']['why']))
    return lines

def process_line(each, now):
    """A line of what describe_process gives."""
    said = [each['process'], each['state']]
    if each['started'] is not None:
        said.append('for ' + span_text(max(0, now - each['started'])))
    if each['restarts']:
        said.append('started again %d times' % each['restarts'])
    if each['memory'] is not None:
        said.append('memory ' + size_text(each['memory']))
    if each['memory_limit']:
        said.append('of ' + size_text(each['memory_limit']))
    return '  '.join(said)

def release_line(each):
    """A line of `releases`. each: as describe_release gives it"""
    took = '%.1f s' % each['seconds'] if each['seconds'] else '-'
    fate = each['state']
    if each['live_again']:
        fate = 'live again since %s: rollback by %s' % (
            time_text(each['live_again']['time']), each['live_again']['by'])
    if fate == 'failed':
        fate = 'failed: ' + each['why']
    made = '' if each['how'] == 'push' else ' (%s)' % each['how']
    return '%4d  %s %8s  %s' % (each['release'],
                                origin_text(each['commit'], each['by'], each['time']),
                                took, fate + made)

def server_lines(found):
    """What `status` prints of the server. found: as describe_server gives it"""
    return [
        'load         ' + ' '.join('%.2f' % each for each in found['load']),
        'memory       %s free of %s' % (size_text(found['memory_free']),
                                        size_text(found['memory'])),
        'disk         %s free of %s' % (size_text(found['disk_free']),
                                        size_text(found['disk'])),
        'docker       ' + (found['docker'] or 'does not answer'),
        'nginx        ' + ('runs' if found['nginx'] else 'does not run'),
        'certificates %d' % found['certificates'], '']

def tell_json(value):
    tell(json_text(value))

def json_text(value):
    import json
    return json.dumps(value, indent=2, sort_keys=True)

# ---- Traffic: what nginx noted of an app, as a page ------------------------------------
# GoAccess reads the logs and draws. Nothing of ours does, and nothing listens.

# How it reads lines: of the format that we give our own files, and of nginx's `combined`
GOACCESS = {'dockhand': '%h %^[%d:%t %^] "%r" %s %b "%R" "%u" %T %^',
            'combined': '%h %^[%d:%t %^] "%r" %s %b "%R" "%u"'}

def access_logs(app, live):
    """[(path, which of GOACCESS)] of the logs in which an app's requests are noted;
    Failure where there is none, or one is written in a way of its own."""
    found = []
    parsed = app.nginx.parse(proxy_path(app.name), live.proxy or '')
    for directive in all_directives(parsed.directives):
        if directive.words[0] != 'access_log' or not directive.words[1].startswith('/'):
            continue
        kind = (directive.words[2:] + ['combined'])[0].replace(
            'dockhand_' + app.name, 'dockhand')
        refuse_if(kind not in GOACCESS, 'the requests to %s are noted in a format of its '
                  'own, %s: only `combined` can be measured', app.name, printable(kind))
        if (directive.words[1], kind) not in found:
            found.append((directive.words[1], kind))

    refuse_if(not found, 'the requests to %s are not measured: they are in no log of its '
              'own (access_log in nginx-proxy.conf)', app.name)
    return found

def parts_of_log(host, path):
    """The files of a log, those that logrotate has made of it first, the oldest first."""
    folder, own = os.path.split(path)
    names = [name for name in list_folder(host.path(folder))
             if re.match(re.escape(own) + ROTATED, name)]

    def age(name):
        """0 for the log itself; of others a number that is larger the older they are:
        logrotate counts up from 1, or, where it is told to, appends the day."""
        number = re.search(r'[.-](\d+)', name[len(own):])
        if number is None:
            return 0
        digits = number.group(1)
        is_day = len(digits) == 8
        return 10 ** 8 - int(digits) if is_day else int(digits)
    return [host.path(folder, name) for name in sorted(names, key=age, reverse=True)]

def draw_report(app, live):
    """Print GoAccess's page of an app's requests."""
    from subprocess import PIPE, Popen
    host = app.host
    logs = access_logs(app, live)
    kind = logs[0][1]
    refuse_if(not host.ask(['which', 'goaccess']).out.strip(), 'goaccess is missing '
              'here: apt-get update; apt-get install goaccess')
    refuse_if(os.isatty(1), 'this is a page for a browser: dockhand report %s > %s.html',
              app.name, app.name)

    parts = []
    for path, other in logs:
        if other == kind:
            parts += parts_of_log(host, path)
        else:
            say('dockhand: what is noted in %s is not measured: it is in another format',
                path)
    reader = Popen(['zcat', '-f', '--'] + parts, stdout=PIPE, env=ENVIRONMENT,
                   close_fds=True)
    drawer = Popen(['goaccess', '--no-global-config', '--no-progress',
                    '--log-format=' + GOACCESS[kind], '--date-format=%d/%b/%Y',
                    '--time-format=%H:%M:%S', '--html-report-title=' + app.name, '-'],
                   stdin=reader.stdout, env=ENVIRONMENT, close_fds=True)
    reader.stdout.close()
    status = drawer.wait()
    reader.wait()
    return status

# ---- Moving: apps as one stream, and back ----------------------------------------------
# A stream is a tar, with a line behind it that says the sum of all that came before: a
# part of one is never taken for the whole. Nothing in it is of one kind of processor: an
# app is built anew from its live commit.

STREAM_FORMAT = 1
SUM_BEGINS = b'dockhand-sha256 '
SUM_LENGTH = len(SUM_BEGINS) + 64 + 1
MANIFEST = 'dockhand.json'
LARGEST_TEXT = 2 ** 24          # bytes of a part that is read as text
# The parts of a stream, each a file
PART = (r'dockhand\.json|keys|certbot-accounts\.tar|certificates/[^/]+\.(pem|tar)'
        r'|apps/[^/]+/(app\.json|own\.pem|repository\.bundle|shallow|volume-[^/]+\.tar)')
VOLUME_NAME = r'[A-Za-z0-9][A-Za-z0-9_.-]*\Z'

# An app in a stream. branch, commit: of what was live, None where nothing was; held: the
# number of that release, the ref of which keeps the commit; names: those that have
# certificates
Moved = namedtuple('Moved', 'name config https stopped branch commit held volumes names')
NOTHING_LIVE = type(None)
KINDS_OF_FIELDS = {
    'name': (str,), 'config': (dict,), 'https': (bool,), 'stopped': (bool,),
    'branch': (str, NOTHING_LIVE), 'commit': (str, NOTHING_LIVE),
    'held': (int, NOTHING_LIVE), 'volumes': (list,), 'names': (list,)}

def check_room(host, path, count, what):
    """Failure where so many bytes, and what a build wants, are not free."""
    free = free_bytes(host, path)
    refuse_if(free < count + SPACE * 1000000, '%s is free on %s, and %s wants %s beside '
              'the %d MB for a build', size_text(free), path, what, size_text(count),
              SPACE)

# Out

def export_apps(host, names):
    """Write apps, the keys that reach them, and their certificates to standard output."""
    import tarfile
    names = in_moving_order(host, names)
    problems = []
    with stream_folder(host) as folder, SumWriter() as writer:
        target = tarfile.open(fileobj=writer, mode='w|', bufsize=2 ** 18,
                              format=tarfile.GNU_FORMAT)
        add_text(target, MANIFEST, to_json({
            'format': STREAM_FORMAT, 'version': version_text(), 'apps': names}))
        add_text(target, 'keys', keys_to_move(host, names))

        host_names = set()
        for name in names:
            moved, problem = export_app(App(host, name), target, folder + '/' + name)
            host_names.update(moved.names)
            if problem:
                problems.append(problem)
        export_certificates(host, sorted(host_names), target, folder)
        target.close()
        writer.write_sum()
    step('%d app(s), %s', len(names), size_text(writer.count))
    refuse_if(problems, 'the stream is whole, but: %s', '; '.join(problems))

class SumWriter(object):
    """Standard output for tarfile inside a `with`, and the sum of what went there. A tar
    that is not closed writes what it still has once nobody has it any more."""
    def __init__(self):
        import hashlib
        self.sum = hashlib.sha256()
        self.count = 0
        self.is_open = True

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.is_open = False

    def write(self, data):
        if self.is_open:
            self.sum.update(data)
            self.count += len(data)
            write_whole(data)

    def write_sum(self):
        write_whole(SUM_BEGINS + to_bytes(self.sum.hexdigest()) + b'\n')

def in_moving_order(host, names):
    """Services last, which others write to: so whatever these have noted as written is
    there. They are brought in the other way round, so that each finds its database."""
    def is_service(name):
        live = App(host, name).live()
        if live is None or live.proxy:
            return False
        return bool(live.port or live.job and published_ports(job_of(live)))
    return sorted(names, key=lambda name: (is_service(name), name))

def keys_to_move(host, names):
    """The lines of the keys that reach some apps, or every app."""
    text = host.as_git(read_file, host.path(host.home(), KEYS)) or ''
    lines = []
    for line in read_authorized_keys(text):
        reach = read_rights(line.key.words).apps if line.key else ()
        if reach is None or any(name in reach for name in names):
            lines.append(line)
    return render_authorized_keys(lines)

def export_app(app, target, folder):
    """Write an app into a tar; (its Moved, why it does not answer since then, or None).
    The app goes on, and may be pushed, before any of it is sent. folder: for copies"""
    problem = None
    with app_lock(app, 'an export of ' + app.name) as live:
        refuse_if(app.name not in all_apps(app.host), 'the app %s is gone', app.name)
        step('Copying %s', app.name)
        moved = describe_moved(app, live)
        make_folder(folder, 0o700)
        replace_file(folder + '/app.json', to_json(dict(moved._asdict())), 0o600)
        own = app.host.text(app.host.certificates.own_path(app.name))
        if own:
            replace_file(folder + '/own.pem', own, 0o600)
        copy_repository(app, moved, folder)
        if moved.volumes:
            problem = copy_volumes(app, live, moved.volumes, folder)

    for name in list_folder(folder):
        add_file(target, 'apps/%s/%s' % (app.name, name), os.path.join(folder, name))
    app.host.run(['rm', '-rf', '--', folder])
    return moved, problem

def describe_moved(app, live):
    """The Moved of an app. live: the Release that is, or None"""
    return Moved(
        name=app.name, config=config_record(app.config()),
        volumes=volumes_to_move(app, live),
        https=app.host.certificates.is_on(app.name), stopped=app.is_stopped(),
        branch=live.branch if live else None, commit=live.commit if live else None,
        held=live.number if live else None, names=full_names(app))

def volumes_to_move(app, live):
    """The names of the volumes that are called after an app, and of those that its live
    release names, be that None; what it writes to and is not in the stream is told."""
    there = app.docker.volumes()
    mounts = mounts_of_release(live) if live else []
    wanted = app.docker.volumes_of(app.name)
    wanted += [mount.source for mount in mounts
               if mount.source in there and mount.source not in wanted]
    elsewhere = [name for name in wanted if app.docker.volume_folder(name) is None]
    folders = [mount.source for mount in mounts
               if '/' in mount.source and not mount.is_read_only]

    for name in elsewhere + folders:
        step('Note: %s, which %s writes to, is not in the stream: it is no volume on the '
             'disk of this server', printable(name), app.name)
    return [name for name in wanted if name not in elsewhere]

def copy_repository(app, moved, folder):
    """Have git pack all branches and tags, and what is live, into a bundle. It holds no
    more than the repository: where that came from a shallow clone, the file that says so
    goes along."""
    if not os.path.isdir(app.repository()):
        return
    wanted = ['--branches', '--tags']
    if moved.commit is not None:
        held = HELD_REF % moved.held
        app.git('update-ref', held, moved.commit)
        wanted.append(held)
    elif not app.git('for-each-ref', '--count=1', 'refs/heads/', 'refs/tags/'):
        return                              # git makes no bundle of nothing

    with create_file(folder + '/repository.bundle') as target:
        act = partial(app.host.run, stdout=target)
        app.git('bundle', 'create', '-', *wanted, act=act)
    shallow = app.host.as_git(read_file, os.path.join(app.repository(), 'shallow'))
    if shallow:
        replace_file(folder + '/shallow', shallow, 0o600)

def copy_volumes(app, live, volumes, folder):
    """Copy the volumes of an app into a folder, while it is stopped if it runs; why it
    does not answer afterwards, or None."""
    host = app.host
    folders = [(name, app.docker.volume_folder(name)) for name in volumes]
    check_room(host, STREAMS, sum(folder_bytes(host, path) for _, path in folders),
               'the copy of the volumes of ' + app.name)
    tasks = [partial(pack, host, path, '%s/volume-%s.tar' % (folder, name))
             for name, path in folders]
    if not runs_or_will(app, live):
        for task in tasks:
            task()
        return None

    app.docker.check_takes_writes(app.name)
    engine = engine_of(app, live)
    log_end = engine.log_end(live)
    stopped = host.clock.monotonic()
    with undone_by(start_again, app):
        replace_file(app.folder('exporting'), '')
        engine.stop(live)
        tell_who_writes(app, volumes)
        for task in tasks:
            task()
    start_again(app)
    try:
        answered = check_or_show_log(app, live, log_end, steady=0)
    except Failure as problem:
        return '%s does not answer since it was copied: %s' % (app.name, problem)
    step('%s was down for %.1f s', app.name, answered - stopped)
    return None

def tell_who_writes(app, volumes):
    """Name what runs yet with some volumes: a line of a crontab that was begun before, a
    one-off command, another app. (No line is begun while the volumes are copied.)"""
    for volume in volumes:
        shown = app.host.ask(['docker', 'ps', '--filter', 'volume=' + volume, '--format',
                              '{{.Names}}'])
        for name in shown.out.split():
            step('Note: %s goes on, and may write to %s meanwhile', name, volume)

def runs_or_will(app, live):
    """Whether an app may write to its volumes at any moment. live: may be None"""
    if live is None or app.is_stopped():
        return False
    engine = engine_of(app, live)
    return engine.state(live).alive is not False or engine.revives(live)

def folder_bytes(host, path):
    """How much of the disk a folder takes. Files may go while they are counted, as an
    app makes and removes them: du says 1 then, and how much it is all the same."""
    argv = ['du', '-skx', '--', path]
    result = host.ask(argv)
    count = result.out.split()[:1]
    if not count or not count[0].isdigit():
        host.check_result(result, argv, NEVER)
        raise Failure('du says nothing of %s', path)
    return int(count[0]) * 1024

def pack(host, folder, path, *names):
    """Write what is in a folder, or some of it, into a tar: owners by number, holes and
    what else tar knows of a file as they are."""
    argv = ['tar'] + tar_options(host) + ['--sparse', '--one-file-system', '-C', folder]
    argv += ['-cf', path, '--'] + list(names or ['.'])
    result = host.ask(argv)
    if result.status == 1:                  # tar's word for that, and for no more
        return step('Note: something wrote there meanwhile: %s', last_line(result.err))
    host.check_result(result, argv, NEVER)

def unpack(host, folder, source, *options):
    """The way back. source: a file that is read from where it stands, to the end of the
    tar in it"""
    host.run(['tar'] + tar_options(host) + list(options) + ['-C', folder, '-xpf', '-'],
             stdin=source)

def tar_options(host):
    """Owners by number; and attributes and rights beside the usual ones, where tar knows
    these (from 1.27 on)."""
    more = ['--xattrs', '--xattrs-include=*', '--acls']
    knows = host.ask(['tar'] + more + ['--version']).status == 0
    return ['--numeric-owner'] + (more if knows else [])

def add_text(target, name, text):
    """Add a file of this text to a tar."""
    import io
    data = to_bytes(text)
    add_part(target, name, io.BytesIO(data), len(data))

def add_file(target, name, path):
    """Add a file of the disk to a tar."""
    with open(path, 'rb') as source:
        add_part(target, name, source, os.path.getsize(path))

def add_part(target, name, source, size):
    import tarfile
    part = tarfile.TarInfo(name)
    part.size = size
    part.mode = 0o600
    part.mtime = int(time.time())
    target.addfile(part, source)

def export_certificates(host, names, target, folder):
    """Write what nginx has for some host names into a tar, and what certbot has, with the
    accounts by which it renews that."""
    certificates = host.certificates
    make_folder(folder + '/certbot', 0o700)
    path = folder + '/certbot/some.tar'
    is_any_renewed = False
    for name in names:
        text = host.text(certificates.path(name))
        if text:
            add_text(target, 'certificates/%s.pem' % name, text)
        if certificates.is_renewed(name):
            lineage = LINEAGE + name
            pack(host, host.path(CERTBOT), path, 'live/' + lineage, 'archive/' + lineage,
                 'renewal/%s.conf' % lineage)
            add_file(target, 'certificates/%s.tar' % name, path)
            is_any_renewed = True

    if is_any_renewed and os.path.isdir(host.path(CERTBOT, 'accounts')):
        pack(host, host.path(CERTBOT), path, 'accounts')
        add_file(target, 'certbot-accounts.tar', path)

# In

def import_apps(host, names):
    """Take the stream from standard input: all its apps and keys, or some apps alone."""
    with stream_folder(host) as folder:
        path = folder + '/stream'
        receive_stream(host, path)
        with open(path, 'rb', 0) as file:       # as others read on from where we are
            stream = Stream(file)
            apps = chosen_apps(stream, names)
            lines = [] if names else moved_keys(host, stream)
            check_is_new(host, apps)
            room = sum(stream.size(part) for moved in apps
                       for part in parts_of(stream, moved))
            check_room(host, host.docker.images_folder(), room, 'what comes in')

            log('import of %s by %s', ' '.join(names) or 'all', host.person())
            if lines:
                change_keys(host, lambda here: insert_keys(here, lines))
            import_certificates(host, apps, stream)
            come_up(host, apps, stream, folder)

def receive_stream(host, path):
    """Write standard input to the disk, while there is room; Failure where it is not a
    whole stream."""
    import hashlib
    found = hashlib.sha256()
    last = b''
    with create_file(path) as target:
        for data in iter(partial(os.read, 0, 2 ** 20), b''):
            check_room(host, STREAMS, len(data), 'what comes in')
            target.write(data)
            last += data
            found.update(last[:-SUM_LENGTH])
            last = last[-SUM_LENGTH:]

    refuse_if(not last, 'nothing came in: sudo dockhand export | ssh HOST sudo dockhand '
              'import')
    refuse_if(last != SUM_BEGINS + to_bytes(found.hexdigest()) + b'\n', 'what came in is '
              'no whole stream of `dockhand export`, or was changed on its way: nothing '
              'has changed')

class Stream(object):
    """A stream that came in whole: its parts by their names. file: without a buffer"""
    def __init__(self, file):
        import tarfile
        self.file = file
        try:
            members = tarfile.open(fileobj=file, mode='r:').getmembers()
        except (tarfile.TarError, ValueError, OverflowError) as problem:
            raise Failure('what came in is no tar: %s', printable(str(problem)))
        self.parts = dict((part.name, part) for part in members)
        for part in members:
            is_known = re.match('(?:%s)\\Z' % PART, part.name) is not None
            refuse_if(not is_known or part.type != tarfile.REGTYPE, 'no export writes %s',
                      printable(part.name))
        refuse_if(len(members) != len(self.parts), 'a name stands twice in what came in')

    def size(self, name):
        return self.parts[name].size

    def at(self, name):
        """The file, to be read from where a part begins."""
        self.file.seek(self.parts[name].offset_data)
        return self.file

    def text(self, name):
        """The text of a part; Failure where it is not there, or too long."""
        refuse_if(name not in self.parts, 'there is no %s in what came in', name)
        size = self.size(name)
        refuse_if(size > LARGEST_TEXT, '%s in what came in is too long', name)
        return to_text(self.at(name).read(size))

    def save(self, name, path):
        """Write a part to a file."""
        left = self.size(name)
        source = self.at(name)
        with create_file(path) as target:
            while left:
                data = source.read(min(left, 2 ** 20))
                target.write(data)
                left -= len(data)

def json_in(stream, name):
    """The dict in a part of a stream; Failure where there is none."""
    import json
    try:
        found = native(json.loads(stream.text(name)))
    except ValueError:
        found = None
    refuse_if(not isinstance(found, dict), '%s in what came in cannot be read', name)
    return found

def moved_in(stream):
    """The [Moved] of a stream in its order; Failure where it holds what no export
    writes."""
    manifest = json_in(stream, MANIFEST)
    version = printable(str(manifest.get('version')))
    refuse_if(manifest.get('format') != STREAM_FORMAT, 'this stream is of another '
              'dockhand, %s: install that one here', version)
    names = manifest.get('apps')
    refuse_if(not isinstance(names, list), '%s in what came in cannot be read', MANIFEST)
    for name in names:
        check_app_name(str(name))
    refuse_if(len(set(names)) != len(names), '%s names an app twice', MANIFEST)

    apps = []
    for name in names:
        found = json_in(stream, 'apps/%s/app.json' % name)
        refuse_if(not is_description(found) or found['name'] != name, 'what came in '
                  'describes %s in another way than an export does', name)
        apps.append(Moved(**dict(found, config=read_config(found['config']))))
    for part in stream.parts:
        refuse_if(part.startswith('apps/') and part.split('/')[1] not in names,
                  'what came in has %s, and no such app', part)
    return apps

def is_description(found):
    """Whether a dict has what the Moved of an app has."""
    if set(found) != set(Moved._fields):
        return False
    if not all(isinstance(found[field], KINDS_OF_FIELDS[field]) for field in found):
        return False
    for key, value in read_config(found['config']).items():
        if not isinstance(key, str) or not isinstance(value, str):
            return False
    if not all(re.match(VOLUME_NAME, str(name)) for name in found['volumes']):
        return False
    if not all(is_full_name(str(name)) for name in found['names']):
        return False

    live = [found['commit'], found['branch'], found['held']]
    if None in live:
        return live == [None] * 3
    return bool(OBJECT_ID.match(found['commit'])) and is_branch_name(found['branch'])

def chosen_apps(stream, names):
    """The [Moved] of those apps of a stream that are wanted, names or all, services
    first."""
    apps = moved_in(stream)
    here = [moved.name for moved in apps]
    missing = [printable(name) for name in names if name not in here]
    refuse_if(missing, 'the stream has no %s, but %s', ' '.join(missing),
              ' '.join(here) or 'no app')
    for moved in apps:
        for name in moved.volumes:
            part = volume_part(moved, name)
            refuse_if(part not in stream.parts, 'there is no %s in what came in', part)
    return [moved for moved in reversed(apps) if not names or moved.name in names]

def volume_part(moved, name):
    return 'apps/%s/volume-%s.tar' % (moved.name, name)

def parts_of(stream, moved):
    """The names of the parts of an app."""
    return [part for part in stream.parts if part.startswith('apps/%s/' % moved.name)]

def moved_keys(host, stream):
    """The [KeyLine] of a stream whose keys are not here; Failure where one of the same
    name may do something else here."""
    here = read_keys(host)
    known = [(key.type, key.blob) for key in here]
    new = []
    for line in read_authorized_keys(stream.text('keys')):
        refuse_if(line.key is None, 'the keys in what came in hold what is no key of '
                  'dockhand: %s', printable(line.text, 40))
        name = check_key_name(line.key.name)
        check_means_something(line.key.words)
        others = [key for key in here if key.name == name and key.words != line.key.words]
        refuse_if(others, 'the key "%s" is here already, and may do something else: '
                  'dockhand remove-key %s, or `import APP...`, which takes no keys', name,
                  name)
        if (line.key.type, line.key.blob) not in known:
            new.append(line)
    return new

def check_is_new(host, apps):
    """Failure where a name of some [Moved] is here already; each is told."""
    there = all_apps(host)
    volumes = host.docker.volumes()
    problems = []
    for moved in apps:
        app = App(host, moved.name)
        if moved.name in there:
            problems.append('the app %s is here already' % moved.name)
            continue
        try:
            check_host_names(app)
        except Failure as problem:
            problems.append(str(problem))
        if host.docker.inspect(latest_tag(app)):
            problems.append('docker has an image %s already' % latest_tag(app))
        problems += ['the volume %s is here already' % name
                     for name in moved.volumes if name in volumes]
    for problem in problems:
        say('dockhand: %s', problem)
    refuse_if(problems, '%d thing(s) in the way, so nothing has changed; `import APP...` '
              'takes some apps alone', len(problems))

def import_certificates(host, apps, stream):
    """Take over the certificates for the names of some [Moved] that have none here, with
    what renews them."""
    certificates = host.certificates
    renewed_names = []
    for name in sorted(set(name for moved in apps for name in moved.names)):
        part = 'certificates/%s.' % name
        if certificates.has_certificate(name):
            continue
        if part + 'tar' in stream.parts:
            if not os.path.isdir(host.path(CERTBOT)):
                make_folder(host.path(CERTBOT))
            unpack(host, host.path(CERTBOT), stream.at(part + 'tar'))
            renewed_names.append(name)
        if part + 'pem' in stream.parts:
            attempt('the certificate of ' + name, certificates.keep,
                    certificates.path(name), stream.text(part + 'pem'))

    if renewed_names:
        if 'certbot-accounts.tar' in stream.parts:
            unpack(host, host.path(CERTBOT), stream.at('certbot-accounts.tar'),
                   '--skip-old-files')
        certificates.write_hook()
        make_folder(host.path(CHALLENGES))
        if not certificates.has_certbot():
            step('Note: %s; then it renews what came in', certificates.no_certbot_text())

def come_up(host, apps, stream, folder):
    """Bring in one app after the other, and have it run; again those that did not come up
    as long as another one did, which they may want. Failure names the rest."""
    reasons = {}
    brought = []
    for moved in apps:
        is_here, reasons[moved.name] = import_app(App(host, moved.name), moved, stream,
                                                  folder)
        if is_here:
            brought.append(moved)

    tried = brought
    while any(not reasons[moved.name] for moved in tried):
        tried = [moved for moved in brought if reasons[moved.name]]
        for moved in tried:
            app = App(host, moved.name)
            with app_lock(app, 'an import of ' + app.name):
                reasons[moved.name] = bring_up(app, moved)

    for moved in apps:
        tell_what_became_of(App(host, moved.name), moved, moved in brought,
                            reasons[moved.name])
    left = [moved.name for moved in apps if reasons[moved.name]]
    refuse_if(left, '%d app(s) did not come up: %s', len(left), ' '.join(left))

def tell_what_became_of(app, moved, is_here, reason):
    """Say whether an app of a stream is here and runs, and what to do if not. reason: why
    it does not, or None"""
    if not reason and not moved.commit:
        tell('%s waits %s', app.name, app.waiting_text())
    elif not reason:
        attempt(app.name, after_push, app, own_connection(app.host))
        tell('%s %s', app.name, 'is stopped, as it was' if moved.stopped else 'runs')
    elif is_here:
        tell('%s did not come up: %s', app.name, reason)
        tell('  what it brought is here: mend that and push, or: sudo dockhand rebuild '
             + app.name)
    else:
        tell('%s was not brought here: %s', app.name, reason)

def import_app(app, moved, stream, folder):
    """Bring an app of a stream here, and have it run: (whether it is here, why it does
    not run, or None). What a crash leaves before that is taken away again."""
    try:
        with app_lock(app, 'an import of ' + app.name):
            refuse_if(app.name in all_apps(app.host), 'somebody has made it meanwhile')
            with undone_by(end_import, app):
                # What is there of them another app of this stream has brought
                there = app.docker.volumes()
                volumes = [name for name in moved.volumes if name not in there]
                make_folder(app.folder(), 0o700)
                replace_file(app.folder('importing'), to_json({
                    'volumes': volumes, 'stopped': moved.stopped}), 0o600)

                step('Bringing %s in', app.name)
                fill_repository(app, moved, stream, folder)
                for name in volumes:
                    fill_volume(app.host, name, stream.at(volume_part(moved, name)))
                fill_store(app, moved, stream)
                why = bring_up(app, moved) if moved.commit else None
            remove_file(app.folder('importing'))
            return True, why
    except (Failure, EnvironmentError) as problem:
        on_signals(leave)           # after undoing they were ignored
        return False, str(problem)

def fill_repository(app, moved, stream, folder):
    """Make the repository, and fetch into it what the bundle holds."""
    host = app.host
    account = host.git_account()
    parts = 'apps/%s/' % app.name
    host.as_git(make_repository, host, app.repository())
    if parts + 'shallow' in stream.parts:
        host.as_git(replace_file, os.path.join(app.repository(), 'shallow'),
                    stream.text(parts + 'shallow'))
    if parts + 'repository.bundle' not in stream.parts:
        return

    path = folder + '/repository.bundle'
    stream.save(parts + 'repository.bundle', path)
    os.chown(path, account.uid, account.gid)
    refs = ['+refs/heads/*:refs/heads/*', '+refs/tags/*:refs/tags/*']
    if moved.commit:
        refs.append('+%s:%s' % (HELD_REF % moved.held, HELD_REF % 1))
    app.git('fetch', '-q', path, *refs)
    remove_file(path)
    if moved.commit:
        app.git('update-ref', 'refs/heads/' + moved.branch, moved.commit)

def fill_volume(host, name, source):
    """Make a volume of what a tar holds. source: as unpack has it"""
    host.run(['docker', 'volume', 'create', name])
    folder = host.docker.volume_folder(name)
    refuse_if(folder is None, 'docker makes the volume %s, and not on a disk here', name)
    unpack(host, folder, source)

def fill_store(app, moved, stream):
    """Write down what the store has of an app without a release."""
    certificates = app.host.certificates
    app.save_config(moved.config)
    own = 'apps/%s/own.pem' % app.name
    if own in stream.parts:
        certificates.keep(certificates.own_path(app.name), stream.text(own))
    if moved.https:
        make_folder(app.host.path(CERTIFICATES), 0o700)
        replace_file(app.folder('https'), '')

def bring_up(app, moved):
    """Build and check the commit of an app that is here, and have it run; why it does
    not, or None."""
    try:
        make_release(app, None, new_release(app, moved.branch, moved.commit,
                                            app.host.person(), 'import'))
    except (Failure, EnvironmentError) as problem:
        on_signals(leave)           # after undoing they were ignored
        return str(problem)
    if moved.stopped:
        stop_live(app, app.live())
    return None

# ---- Machines: one more, and one less --------------------------------------------------
# What `machines` does: docker is there, a network that listens on a private address
# alone, the swarm joined, and an image tried. Uses the chapter, and apps and engines.

# sh for a machine. Its docker, described; what the swarm publishes is on one address
# alone; into the swarm, and out of it
DESCRIBE_DOCKER = 'docker info --format "{{json .}}"'
BRIDGE = 'docker_gwbridge'          # docker's own name for it
HAS_BRIDGE = '''docker network inspect docker_gwbridge --format \
'{{index .Options "com.docker.network.bridge.host_binding_ipv4"}}' 2>/dev/null'''
MAKE_BRIDGE = '''docker network rm docker_gwbridge >/dev/null 2>&1
docker network create --subnet "$2" -o com.docker.network.bridge.name=docker_gwbridge \
    -o com.docker.network.bridge.enable_icc=false \
    -o com.docker.network.bridge.enable_ip_masquerade=true \
    -o com.docker.network.bridge.host_binding_ipv4="$1" docker_gwbridge >/dev/null'''
ROUTES = 'ip -4 route show root "$1"; ip -4 route show match "$1"'
JOIN = 'docker swarm join --token "$1" --advertise-addr "$2" --data-path-addr "$2" "$3"'
LEAVE = '''docker swarm leave >/dev/null 2>&1
docker network rm docker_gwbridge >/dev/null 2>&1 || :'''

def add_machine(host, target):
    """Have a machine run apps of this server. target: root@ADDRESS"""
    address = machine_address(target)
    with membership(host):
        machine = join_machine(host, address)
    for app, live in live_apps(host):
        attempt(app.name, engine_of(app, live).join, live)
        attempt(app.name, write_cron_script, app, live)
    log('machines: %s at %s is added by %s', machine.name, address, host.person())
    return machine

def join_machine(host, address):
    """The Machine at an address, once it belongs to our swarm and has taken an image."""
    machines = host.machines
    refuse_if(address in [machine.address for machine in machines.all()],
              '%s is one of the machines already', address)

    front = docker_of(host, None)
    stranger = Machine(None, address, address, False, '', True, {}, '', '')
    there = docker_of(host, stranger)
    check_fits(front, there, address)
    taken = [front['Name']] + [machine.name for machine in machines.all()]
    refuse_if(there['Name'] in taken, 'another machine is called %s: hostnamectl '
              'set-hostname NAME, there, and restart docker', printable(there['Name']))
    own_address = address_towards(host, address)
    is_first = not machines.are_any()
    subnet = free_subnet(host) if is_first else machines.subnet()
    check_routes(host, stranger, subnet)

    with undone_by(leave_if_alone, host):
        if is_first:
            step('Making this server the front of a swarm, at %s', own_address)
            begin_swarm(host, own_address, subnet)
        with undone_by(forget_machine, host, stranger):
            step('Joining %s, where root of this server is root', address)
            join_swarm(host, stranger, subnet)
            machine = wait_for_machine(host, address)
            step('Trying an image there')
            try_image(host, machine)
    return machine

def machine_address(target):
    """The address in root@ADDRESS; Failure for anything else."""
    user, _, address = target.partition('@')
    is_plain = re.match(r'[0-9]+(\.[0-9]+){3}\Z', address) is not None
    if user != 'root' or not is_plain or not is_address(address):
        raise Failure('wanted: machines add root@ADDRESS, the fixed private address by '
                      'which this server reaches it, as root@10.0.0.2')
    return address

def docker_of(host, machine):
    """What `docker info` says on a machine, as a dict; None is this server."""
    import json
    if machine is None:
        result = host.ask(['sh', '-c', DESCRIBE_DOCKER])
    else:
        result = host.machines.ask(machine, DESCRIBE_DOCKER)
    where = machine.address if machine else 'this server'
    refuse_if(result.status == 255, '%s: %s (root of this server reaches it by ssh '
              'without a password: ssh-copy-id root@%s)', where, last_line(result.err),
              where)
    refuse_if('not found' in result.err, '%s: docker is missing there: sh '
              'configure-system.sh --worker, as root', where)
    try:
        told = native(json.loads(result.out))
    except ValueError:
        told = {}
    refuse_if(not told.get('ServerVersion'), '%s: docker does not answer: %s', where,
              last_line(result.err or result.out))
    return told

def check_fits(front, there, address):
    """Failure where the docker of a machine cannot belong to ours. front, there: as
    docker_of gives them"""
    for told, where in ((front, 'this server'), (there, address)):
        version = tuple(map(int, re.findall(r'\d+', told['ServerVersion'])[:2]))
        refuse_if(version < OLDEST_SWARM, '%s: docker %s is too old: 20.10 is wanted, or '
                  'later', where, told['ServerVersion'])
        refuse_if(told.get('LiveRestoreEnabled'), '%s: docker has live-restore, and '
                  'belongs to no swarm with that: take it out of /etc/docker/daemon.json',
                  where)
        backend = (told.get('FirewallBackend') or {}).get('Driver', '')
        refuse_if('nftables' in backend and 'iptables' not in backend, '%s: docker has '
                  'the firewall backend nftables, which knows no swarm: take it out of '
                  '/etc/docker/daemon.json', where)

    swarm = (there.get('Swarm') or {}).get('LocalNodeState', 'inactive')
    refuse_if(swarm != 'inactive', '%s belongs to another swarm (%s): docker swarm '
              'leave, there', address, printable(swarm))
    refuse_if(front['Architecture'] != there['Architecture'], '%s has another kind of '
              'processor (%s, here %s): no image runs on both', address,
              printable(there['Architecture']), front['Architecture'])

def address_towards(host, address):
    """The address of this server by which a machine reaches it."""
    route = host.ask(['ip', '-4', 'route', 'get', address]).out
    found = re.search(r'\bsrc ([0-9.]+)', route)
    refuse_if(route.startswith('local'), '%s is this server itself', address)
    refuse_if(not found, 'no route leads from here to %s', address)
    return found.group(1)

def free_subnet(host):
    """The first half of a /16 that nothing here uses, for what the swarm makes."""
    own = [pool_of(network) for network in host.docker.networks()]
    taken = [(pool or {}).get('Subnet', '').rsplit('.', 2)[0] for pool in own]
    for subnet in SUBNETS:
        if subnet not in taken and not is_routed(host, subnet):
            return subnet
    raise Failure('no /16 of 10.86 to 172.31 is free for the network of the machines')

def check_routes(host, machine, subnet):
    """Failure where a machine has other use for what the swarm is to have there."""
    shown = host.machines.told(machine, ROUTES, subnet + '.0.0/16')
    for route in shown.splitlines():
        if route[:1].isalnum() and not re.match(LARGE_ROUTE, route):
            raise Failure('%s: the networks of machines are below %s.0.0/16, which it '
                          'uses already: %s', machine.name, subnet, printable(route))

def bridge_subnet(subnet):
    return subnet + '.192.0/20'

def begin_swarm(host, address, subnet):
    """Make this server the manager of a swarm without a machine more."""
    refuse_if(docker_of(host, None)['Swarm']['LocalNodeState'] != 'inactive', 'docker '
              'here belongs to a swarm already; if nobody wants that: docker swarm leave '
              '--force')
    with undone_by(end_swarm, host):
        make_bridge(host, host.ask, address, subnet)
        host.run(['docker', 'swarm', 'init', '--advertise-addr', address,
                  '--data-path-addr', address, '--default-addr-pool',
                  subnet + '.128.0/18', '--default-addr-pool-mask-length', '24',
                  '--dispatcher-heartbeat', '3s'])
        host.run(['docker', 'network', 'create', '--driver=overlay', '--attachable',
                  '--subnet', subnet + '.0.0/17', OVERLAY])
        replace_file(host.path(MACHINES), subnet + '\n')

def make_bridge(host, ask, address, subnet):
    """Have what docker publishes of a swarm be on one address alone."""
    has = ask(['sh', '-c', HAS_BRIDGE])
    if has.out.strip() == address:
        return
    result = ask(['sh', '-c', MAKE_BRIDGE, 'sh', address, bridge_subnet(subnet)])
    refuse_if(result.status, '%s: docker cannot make its network %s: %s', address, BRIDGE,
              last_line(result.err or result.out))

def join_swarm(host, machine, subnet):
    """Have a machine belong to our swarm."""
    def ask(argv):
        return host.machines.ask(machine, argv[2], *argv[4:])
    make_bridge(host, ask, machine.address, subnet)
    token = host.run(['docker', 'swarm', 'join-token', '-q', 'worker']).strip()
    manager = '%s:2377' % host.machines.front().address
    host.machines.told(machine, JOIN, token, machine.address, manager)
    # Whoever was on one of the two may have read it from the list of processes.
    host.run(['docker', 'swarm', 'join-token', '--rotate', '-q', 'worker'])

def wait_for_machine(host, address):
    """The Machine at an address, once docker's manager hears of it."""
    deadline = host.clock.monotonic() + NODE_PATIENCE
    while host.clock.monotonic() < deadline:
        for machine in host.machines.all():
            if machine.address == address and is_up(machine):
                return machine
        host.clock.sleep(0.5)
    raise Failure('%s does not come: are 2377/tcp, 7946 and 4789/udp open between the '
                  'two?', address)

TRIAL = 'dockhand--trial'           # an image; `--` is in no name of an app

def try_image(host, machine):
    """Failure where an image is not the same on a machine, or goes there whole alone."""
    with stream_folder(host) as folder:
        tags = [TRIAL + ':1', TRIAL + ':2']
        try:
            for tag, below in zip(tags, [None, tags[0]]):
                make_trial(host, folder, tag, below)
                image = host.docker.inspect(tag)[0]['Id']

                with host.machines.saving(tag) as save:
                    host.machines.ship(machine, tag, image, save)
        finally:
            host.machines.ask(machine, DROP_IMAGES, *reversed(tags))
            host.ask(['docker', 'rmi'] + list(reversed(tags)))

DROP_IMAGES = 'docker rmi "$@" >/dev/null 2>&1 || :'

def make_trial(host, folder, tag, below):
    """An image of one layer, or of one more than another has. below: its tag, or None"""
    import tarfile
    path = os.path.join(folder, 'trial')
    with open(path, 'w') as target:
        target.write(random_id())
    if below is None:
        archive = os.path.join(folder, 'trial.tar')
        with tarfile.open(archive, 'w') as target:
            target.add(path, 'trial')
        return host.run(['docker', 'import', archive, tag])

    name = TRIAL + '-' + random_id()
    host.run(['docker', 'create', '--name', name, below, '/trial'])
    try:
        host.run(['docker', 'cp', path, name + ':/trial'])
        host.run(['docker', 'commit', name, tag])
    finally:
        host.ask(['docker', 'rm', '-f', name])

def remove_machine(host, name, leave_it):
    """Have a machine run nothing of ours any more. leave_it: a function of the host, has
    apps go on without the machines that are to get nothing new"""
    with membership(host):
        machine = machine_to_remove(host, name)
        set_availability(host, machine, 'pause')
        leave_it(host)

        if machine.state == 'ready':
            step('%s finishes what it was asked', name)
            set_availability(host, machine, 'drain')
            wait_until_empty(host, machine)
        for label in sorted(machine.labels):
            if read_machine_label(label):
                host.machines.drop(machine, label)
        forget_machine(host, machine)
        leave_if_alone(host)
    log('machines: %s is removed by %s', name, host.person())

def membership(host):
    """The lock for who belongs to the swarm."""
    return locked(host.path(LOCKS, '.members'), 'a change of machines')

def machine_to_remove(host, name):
    """The Machine of this name; Failure where it must stay."""
    machines = host.machines.all()
    found = [machine for machine in machines if machine.name == name]
    refuse_if(not found, 'no machine %s here: see dockhand machines', printable(name))
    machine = found[0]
    refuse_if(machine.is_front, '%s is this server, which stays', printable(name))

    left = [other for other in machines if other != machine and other.is_active]
    for live in spread_apps(host):
        wanted = live.config['machines']
        refuse_if(len(left) < 2, '%s is the last one, and %s runs there; first: dockhand '
                  'config %s --unset machines', printable(name), live.app, live.app)
        refuse_if(wanted != 'all' and int(wanted) > len(left), '%s runs on %s machines, '
                  'and %d would be left; first: dockhand config %s machines=%d', live.app,
                  wanted, len(left), live.app, len(left))
    return machine

def set_availability(host, machine, word):
    """Say what docker may run on a machine. word: docker's, as `pause`: nothing new"""
    host.run(['docker', 'node', 'update', '--availability', word, machine.id])

def wait_until_empty(host, machine):
    """Wait, DRAIN seconds at most, until a machine runs no task."""
    deadline = host.clock.monotonic() + DRAIN
    argv = ['docker', 'node', 'ps', '--format', TASK_FORMAT, machine.id]
    while any(is_at_work(task) for task in read_tasks(host.run(argv))):
        if host.clock.monotonic() > deadline:
            return
        host.clock.sleep(0.5)

def forget_machine(host, machine):
    """Have a machine leave the swarm, be it off or not quite in it."""
    gone = host.machines.ask(machine, LEAVE)
    if gone.status:
        step('%s cannot be reached; on it, once it is: docker swarm leave', machine.name)
    for known in host.machines.all():
        if known.address == machine.address:
            host.run(['docker', 'node', 'rm', '--force', known.id])

def leave_if_alone(host):
    """End the swarm where no other machine belongs to it."""
    if host.machines.are_any() and len(host.machines.all()) == 1:
        end_swarm(host)

def end_swarm(host):
    """Have this server be in no swarm, and what was made for it be gone. What else is
    done here must not want it any more, whatever becomes of that."""
    remove_file(host.path(MACHINES))
    for app, live in live_apps(host):
        attempt(app.name, write_cron_script, app, live)
    attached = host.ask(['docker', 'ps', '-aq', '--filter', 'network=' + OVERLAY])
    for container in attached.out.split():
        host.ask(['docker', 'network', 'disconnect', '-f', OVERLAY, container])
    host.ask(['docker', 'network', 'rm', OVERLAY])
    host.run_unless('not part of a swarm', ['docker', 'swarm', 'leave', '--force'])
    host.ask(['docker', 'network', 'rm', BRIDGE])

def live_apps(host):
    """[(App, its live Release)], but for what waits for its first push."""
    apps = [App(host, name) for name in list_apps(host)]
    pairs = [(app, app.live()) for app in apps]
    return [(app, live) for app, live in pairs if live is not None]

def spread_apps(host):
    """The live releases that run on several machines, as [Release]."""
    return [live for _, live in live_apps(host) if live.machines]

def catch_up(host):
    """Bring each machine what it has missed while it was off, and take away what has
    gone meanwhile."""
    for machine in host.machines.all():
        for label in sorted(machine.labels):
            known = read_machine_label(label)
            if known and not is_kept(host, *known):
                host.machines.drop(machine, label)
    for live in spread_apps(host):
        _, wrong = host.machines.bring(live, image_tag(live))
        for problem in wrong:
            step('%s: %s', live.app, problem)

def is_kept(host, name, number):
    """Whether an app has a release that may run again, or is being made."""
    app = App(host, name)
    return number in app.numbers() and not app.load(number).failed

def describe_machine(host, machine):
    """What `machines` shows of a machine."""
    found = {'name': machine.name, 'address': machine.address,
             'state': state_text(machine),
             'front': machine.is_front, 'processor': machine.kind,
             'docker': machine.docker, 'disk_free': None, 'runs': []}
    if machine.state != 'ready':
        return found

    shown = host.machines.ask(machine, FREE_DISK)
    fields = shown.out.strip().rpartition('\n')[2].split()
    if shown.status == 0 and fields[3:] and fields[3].isdigit():
        found['disk_free'] = int(fields[3]) * 1024
    argv = ['docker', 'node', 'ps', '--filter', 'desired-state=running', '--format',
            '{{.Name}}', machine.id]
    names = host.run(argv).split()
    found['runs'] = sorted(set(app_of_service(name) for name in names))
    return found

FREE_DISK = 'df -Pk "$(docker info --format "{{.DockerRootDir}}")"'

def machine_line(found):
    """A line of `machines`. found: as describe_machine gives it"""
    free = '? free'
    if found['disk_free'] is not None:
        free = size_text(found['disk_free']) + ' free'
    role = 'front' if found['front'] else ''
    return '%-16s %-15s %-8s %-8s %-12s %-6s %s' % (
        found['name'], found['address'], found['state'], found['processor'], free, role,
        ' '.join(found['runs']))

# ---- Installing, and whether all is well -----------------------------------------------
# Every file that is ours on this machine, and what would keep them from working.

def script_path():
    """Where the file lies that runs now."""
    return os.path.abspath(__file__).replace('.pyc', '.py')

Part = namedtuple('Part', 'path text mode')         # of an installation

def installed_parts(host):
    """Every file that `install` writes but for the token, as [Part]."""
    source = read_file(script_path())

    # Launchers neither collect garbage nor take the interpreter down, which saves 7 of a
    # start's 30 ms: nothing is lost, since all that is printed was written by os.write.
    launcher = partial(LAUNCHER.format, python=sys.executable, library=LIBRARY,
                       flags='-Es' if PYTHON_2 else '-IS')
    parts = [
        Part(USER_FILE, host.user + '\n', 0o644),
        Part(LIBRARY + '/dockhand.py', source, 0o644),
        Part(LIBRARY + '/dockhand', launcher(role='dockhand'), 0o755),
        Part(PROGRAM, program_text(host), 0o755),
        Part(RECEIVE, launcher(role='receive'), 0o755),
        Part(TEMPLATE + '/config', REPOSITORY_CONFIG, 0o644),
        Part(SUDOERS, SUDOERS_TEXT.format(user=host.user, receive=RECEIVE,
                                          asked=' '.join(ASKED)), 0o440),
        Part(CATCH_ALL, host.nginx.catch_all_text(host.nginx.files()), 0o644)]

    if is_systemd(host):
        parts.append(Part(UNIT, UNIT_TEXT.format(program=PROGRAM), 0o644))
    elif is_upstart(host):
        parts.append(Part(BOOT_JOB, BOOT_JOB_TEXT.format(program=PROGRAM), 0o644))
    elif has_init_scripts(host):
        parts.append(Part(BOOT_SCRIPT, BOOT_SCRIPT_TEXT.format(program=PROGRAM), 0o755))
    if host.certificates.are_renewed():
        parts.append(Part(RENEWAL_HOOK, RENEWAL_HOOK_TEXT, 0o755))
    return parts + hooks_in(TEMPLATE)

def program_text(host):
    """The sh that PROGRAM is."""
    environment = ['%s=%s' % (name, quote(value))
                   for name, value in sorted(ENVIRONMENT.items()) if name != 'HOME']
    between = ' \\\n' + 16 * ' '
    return PROGRAM_TEXT.format(
        home=quote(host.home()), state=STATE, uses=USES,
        environment=between.join(environment), git=' '.join(GIT_SERVES),
        python=LIBRARY + '/dockhand')

def installed_hooks(host):
    """Those of the repositories that are there already, as [Part]."""
    hooks = []
    for name in all_apps(host):
        if os.path.isdir(App(host, name).repository()):
            hooks += hooks_in('%s/%s.git' % (host.home(), name))
    return hooks

def hooks_in(folder):
    return [Part(folder + '/hooks/' + name, text, 0o755) for name, text in HOOKS]

def compile_script(host):
    """Write our script's compiled form, with which a start costs the same at any length;
    True if there was none, or it was older."""
    import py_compile
    name = LIBRARY + '/dockhand.py'
    script = host.path(name)
    compiled = compiled_path(script)

    if os.path.exists(compiled):
        if os.stat(compiled).st_mtime >= os.stat(script).st_mtime:
            return False
    py_compile.compile(script, dfile=name, doraise=True)
    tell('wrote ' + compiled_path(name))
    return True

def compiled_path(script):
    """Where this Python looks for a script's compiled form."""
    if PYTHON_2:
        return script + 'c'
    from importlib.util import cache_from_source
    return cache_from_source(script)

ENABLERS = ('/usr/sbin/update-rc.d', '/sbin/rc-update')

def has_init_scripts(host):
    """Whether what boots this machine runs /etc/init.d: sysvinit, OpenRC and runit do, as
    Debian has them."""
    if not os.path.isdir(host.path('/etc/init.d')):
        return False
    return any(os.path.exists(host.path(path)) for path in ENABLERS)

def enable_at_boot(host):
    """Have init run `dockhand recover`; True if it did not before."""
    if is_systemd(host):
        changed = False
        for link in UNIT_ENABLED:
            folder = os.path.dirname(host.path(link))
            if not os.path.isdir(folder):
                make_folder(folder)
            if replace_link(host.path(link), UNIT):
                changed = True
        tell_systemd(host)
        return changed
    if is_upstart(host) or not has_init_scripts(host):
        return False

    name = os.path.basename(BOOT_SCRIPT)
    before = enabled_scripts(host)
    if os.path.exists(host.path(ENABLERS[0])):
        host.run(['update-rc.d', name, 'defaults'])
    else:
        host.run_unless('already', ['rc-update', 'add', name, 'default'])
    return enabled_scripts(host) != before

def tell_systemd(host):
    """Have systemd read units, and links to them, that it would see at the next boot.
    `install` does so though it has changed nothing: one before may have been killed."""
    host.run(['systemctl', 'daemon-reload'])

def enabled_scripts(host):
    """The links that have our script run, in each folder of a runlevel."""
    folders = ['/etc/rc%s.d' % level for level in '0123456S'] + ['/etc/runlevels/default']
    links = [os.path.join(folder, name) for folder in folders
             for name in list_folder(host.path(folder))]
    return [link for link in links if link.endswith('dockhand-recover')]

def disable_at_boot(host):
    """Have no init run `dockhand recover` any more; the files that were removed."""
    removed = [path for path in UNIT_ENABLED + [UNIT, BOOT_JOB, BOOT_SCRIPT]
               if remove_file(host.path(path))]
    if removed and is_systemd(host):
        tell_systemd(host)
    name = os.path.basename(BOOT_SCRIPT)
    if enabled_scripts(host):
        if os.path.exists(host.path(ENABLERS[0])):
            host.run(['update-rc.d', '-f', name, 'remove'])
        else:
            host.run(['rc-update', 'del', name, 'default'])
    return removed

def remove_installation(host):
    """Remove dockhand itself: what runs it first, its own files last, so that one that is
    killed at this can be run again."""
    with host_lock(host):
        replace_file(host.path(KEPT_USER), host.user + '\n')
        removed = disable_at_boot(host)
        removed += [path for path in (SUDOERS, OLDER_NAME, PROGRAM)
                    if remove_file(host.path(path))]
        if os.path.isdir(host.path(LIBRARY)):
            host.run(['rm', '-rf', '--', host.path(LIBRARY)])
            removed.append(LIBRARY)
    for path in removed:
        tell('removed ' + path)

# What an uninstalled dockhand leaves: what it is, where, and how it is removed. A path is
# told of if it is there.
LEFT = [
    ('containers and images of apps', 'docker ps -a; docker images',
     'docker rm -f APP--N; docker rmi APP:N'),
    ('their data', 'docker volume ls', 'docker volume rm APP--PATH'),
    ('their network', 'docker network ls', 'docker network rm ' + NETWORK),
    ('their jobs', JOBS + '/APP.conf', 'stop APP; rm %s/APP.*' % JOBS),
    ('their proxy files', PROXIES + '/APP.conf', 'rm that; nginx -s reload'),
    ('the 404 for other names', CATCH_ALL, 'rm that; nginx -s reload'),
    ('their crontabs', CRON_FILES + '/dockhand-APP', 'rm %s/dockhand-APP' % CRON_FILES),
    ('the swarm of other machines', MACHINES,
     'docker swarm leave --force, on each; rm ' + MACHINES),
    ('certificates', CERTIFICATES, 'certbot delete --cert-name dockhand-NAME'),
    ('what copies renewed ones there', RENEWAL_HOOK, 'rm ' + RENEWAL_HOOK),
    ('config, records, crontabs\' sh', STATE, 'rm -r %s, last of all' % STATE),
    ('repositories and keys', '/home/USER', 'userdel -r USER')]

def tell_what_is_left(host):
    """Say where each piece of what goes on lies, and how it is removed."""
    tell('\nEvery app goes on, also after a reboot. What is left, and what removes it:')
    for what, where, how in LEFT:
        where = where.replace('/home/USER', host.home())
        folder = os.path.dirname(where) if 'APP' in where else where
        if not where.startswith('/') or os.path.exists(host.path(folder)):
            tell('  %s: %s\n      %s', what, where, how.replace('USER', host.user))
    tell('`python3 dockhand.py install` finds all of it again.')

PACKAGES = (('docker', 'docker.io'), ('git', 'git'), ('nginx', 'nginx'),
            ('sshd', 'openssh-server'), ('ssh-keygen', 'openssh-client'),
            ('visudo', 'sudo'), ('useradd', 'passwd'), ('ss', 'iproute2'))

WELL = ('', '')                 # a row for `demand` of what is as it should be

def demand(rows):
    """Tell every problem, of [(what is wrong or nothing, what to type)]; Failure then."""
    problems = [row for row in rows if row[0]]
    for problem, remedy in problems:
        tell('WRONG  %s\n       type: %s', problem, remedy)
    refuse_if(problems, '%d thing(s) to mend', len(problems))

def requirements(host):
    """Whether this machine has what dockhand calls, as rows for `demand`."""
    paths = dict((name, host.ask(['which', name]).out.strip()) for name, _ in PACKAGES)
    rows = [(name + ' is missing', 'apt-get update; apt-get install ' + package)
            for name, package in PACKAGES if not paths[name]]
    if paths['docker']:
        rows += docker_problems(host, paths['docker'])
    return rows

def docker_problems(host, path):
    """What keeps the docker at a path from running apps: rows for `demand`."""
    rows = []
    bring = 'apt-get install docker.io'
    status, out, err = host.ask(['docker', 'version'])
    if os.path.realpath(path).startswith('/snap'):
        rows.append(('a snap cannot read /var/lib', 'snap remove docker; ' + bring))
    is_podman = 'podman' in (out + err).lower()
    if is_podman:
        rows.append(('docker is podman', bring))

    if status != 0:
        rows.append(('docker does not answer: ' + last_line(err),
                     'service docker start || dockerd &'))
    elif not is_podman and not is_upstart(host) and host.docker.version() < (1, 11):
        rows.append(('docker is older than 1.11, and init is not Upstart', bring))
    return rows

def ensure_user(host):
    """Make the git user where there is none; True if there was none."""
    account = host.account()
    user = host.user
    if account is None:
        host.run('useradd -m -d /home/{0} -s /bin/sh -p * {0}'.format(user).split())
        tell('made the user ' + user)
        return True

    has_no_shell = account.shell.endswith(('nologin', 'git-shell', 'false'))
    refuse_if(has_no_shell or account.uid == 0,
              "the user %s is somebody else's: dockhand.py install --user "
              'NAME takes another', user)
    return False

def ensure_token(host):
    """Make this server's token where there is none; True if there was none."""
    import binascii
    if host.nginx.token():
        return False
    number = to_text(binascii.hexlify(os.urandom(8)))
    return install_part(host, TOKEN_FILE, number + '\n', 0o644)

def install_part(host, name, text, mode):
    """Write a file, the git user's under its home, after those who read it found nothing
    wrong with it; True if it changed."""
    def check(new):
        if name == SUDOERS:
            host.run(['visudo', '-c', '-q', '-f', new])
        if name == CATCH_ALL:
            wrong = host.nginx.test('dockhand', '', host.nginx.files())
            refuse_if(wrong, "nginx's configuration is broken, mend it first: %s", wrong)

    if name.startswith(host.home() + '/'):
        changed = host.as_git(install_file, host.path(name), text, mode)
    else:
        changed = install_file(host.path(name), text, mode, check)
    if changed:
        tell('wrote ' + name)
    return changed

def install_file(path, text, mode, check=None):
    """Write a file, as replace_file does, and the folder that it is in."""
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        make_folder(folder)
    return replace_file(path, text, mode, check)

def disable_default_site(host):
    """Move the distribution's default site, which claims `default_server`, out of the way
    if it is as its package brought it, by dpkg's own checksum; True if it was moved."""
    import hashlib
    query = ['dpkg-query', '-W', '-f', '${Conffiles}\n', 'nginx*']
    for site in ('/etc/nginx/sites-enabled/default', '/etc/nginx/conf.d/default.conf'):
        text = host.text(site)
        packaged = site.replace('enabled', 'available')
        known = '%s %s' % (packaged, hashlib.md5(to_bytes(text)).hexdigest())

        if text and known in host.ask(query).out:
            os.rename(host.path(site), host.path(packaged + '.disabled'))
            tell("disabled nginx's default site: it is %s.disabled now", packaged)
            return True
    return False

def settle_again(app):
    """Have an app kept running as this version does it: an older one may have set docker
    another policy."""
    with app_lock(app, 'dockhand install') as live:
        if live is None or app.is_stopped():
            return
        engine = engine_of(app, live)
        if engine.state(live).alive:
            engine.settle(live)

def sudo_problem(host):
    """What keeps the git user from running its one command, as a hook will, or None."""
    check = ['sudo', '-n', RECEIVE, 'check']
    status, _, err = host.ask(check, account=host.account())
    if status == 0:
        return None
    return ('the user %s cannot run %s by sudo (%s): /etc/sudoers must have `#includedir '
            '/etc/sudoers.d`' % (host.user, RECEIVE, last_line(err)))

def sshd_problems(host):
    """Options of sshd that keep the git user or its keys out: rows for `demand`."""
    said = host.ask(['sshd', '-T']).out
    for option, wanted in (('AllowUsers', host.user), ('AllowGroups', host.user),
                           ('AuthorizedKeysFile', KEYS)):
        value = ' '.join(re.findall('(?im)^%s (.*)' % option, said))
        if value and not re.search('(?:^|[ /])%s(?: |$)' % re.escape(wanted), value):
            yield ('%s of sshd is %s, without %s' % (option, value, wanted),
                   'edit /etc/ssh/sshd_config, then reload ssh')

def app_problem(app):
    """What is wrong with an app, or nothing, and what to type: a row for `demand`."""
    live = app.live()
    if app.held_for():                  # what is half done is no fault yet
        return WELL
    if app.linked('pending'):
        return 'a deploy of %s was interrupted' % app.name, 'sudo dockhand recover'
    if live is None:
        return WELL

    if not app.docker.inspect(image_tag(live)):
        return 'the image of %s is gone' % app.name, 'sudo dockhand rebuild ' + app.name
    if not app.is_stopped() and not engine_of(app, live).state(live).alive:
        return app.name + ' does not run', 'sudo dockhand start ' + app.name
    if is_proxy_wrong(app, live) and not form_refused(app, live):
        return 'the proxy file of %s is not in place' % app.name, 'sudo dockhand recover'
    if live.proxy and not holds_ours(app, live):
        path = proxy_path(app.name)
        return (path + ' was changed on the server: the next push will be refused for it',
                'commit that as nginx-proxy.conf, or: sudo rm %s; sudo dockhand recover'
                % path)
    problem, remedy = crontab_problem(app, live)
    if problem:
        return problem, remedy
    return answer_problem(app, live), 'less /var/log/nginx/error.log'

def problems_of(app):
    """What an app's owner may meet, each row as `demand` wants it."""
    host = app.host
    said = host.ask(['docker', 'version'])
    if said.status:
        return [('docker does not answer: ' + last_line(said.err),
                 'service docker start')]
    live = app.live()
    if live is None:
        return [('%s was never live; it waits %s' % (app.name, app.waiting_text()),
                 'git push git@HOST:%s HEAD:main' % app.name)]

    rows = [memory_problem(app, live), app_problem(app), health_problem(app, live),
            place_problem(app, live), room_problem(app), nginx_problem(host)]
    if host.certificates.is_on(app.name):
        rows += https_problems_of(app)
    return rows

def memory_problem(app, live):
    """Whether the kernel killed a process of an app, as a row for `demand`."""
    processes = engine_of(app, live).own(live)
    there = app.docker.inspect(*[process.name for process in processes])
    killed = set(container['Name'][1:] for container in there
                 if container['State'].get('OOMKilled'))
    titles = [title_of(process) for process in processes if process.name in killed]
    if not titles:
        return WELL
    return ('%s of %s was out of memory, and the kernel killed it'
            % (' '.join(titles), app.name),
            'dockhand config %s options="--memory 1g", or a server with more' % app.name)

def health_problem(app, live):
    """What a HEALTHCHECK says against an app, as a row for `demand`."""
    if app.is_stopped():
        return WELL
    state = engine_of(app, live).state(live)
    if not state.alive or state.health in ('', 'healthy'):
        return WELL
    said = 'the HEALTHCHECK of %s says %s' % (app.name, state.health)
    return and_then(said, state.check), 'dockhand logs ' + app.name

def place_problem(app, live):
    """Whether an app listens where nothing reaches it, as a row for `demand`."""
    if live.job or app.is_stopped():
        return WELL
    alone, open_ports = listening_ports(app.host, engine_of(app, live).state(live).pids)
    if live.port and live.port not in open_ports and live.port in alone:
        return ('%s listens on 127.0.0.1:%d alone' % (app.name, live.port),
                'make it listen on 0.0.0.0, and push that')
    if may_be_web(live) and open_ports:
        return ('%s listens on %d, and nginx passes nothing to it'
                % (app.name, open_ports[0]),
                'dockhand config %s port=%d (or port=none)' % (app.name, open_ports[0]))
    return WELL

def room_problem(app):
    """Whether the disk is too full for a push, as a row for `demand`."""
    folder = app.docker.images_folder()
    left = min(free_bytes(app.host, path) for path in (folder, STATE)
               if os.path.exists(app.host.path(path))) // 1000000
    if left >= SPACE:
        return WELL
    return ('%d MB of the disk are free: a push wants %d' % (left, SPACE),
            'docker system df; docker system prune')

def crontab_problem(app, live):
    """Why cron does not run the lines of a live app, or nothing, and what to type: a row
    for `demand`."""
    if not live.crontab:
        return WELL
    problem, remedy = cron_missing(app.host)
    if problem:
        return 'the crontab of %s does not run: %s' % (app.name, problem), remedy
    if not runs_cron(app.host):
        return 'the crontab of %s does not run: cron is stopped' % app.name, START_CRON
    if is_crontab_gone(app, live):
        return 'the crontab of %s is not in place' % app.name, 'sudo dockhand recover'

    path = cron_path(app.name)
    if app.host.text(path) != render_cron_file(live):
        return (path + ' was changed on the server: the next push will be refused for it',
                'commit that in crontab; then: sudo rm %s; sudo dockhand recover' % path)
    return WELL

def https_problems(host):
    """What keeps names from https, now or at the next renewal: rows for `demand`."""
    certificates = host.certificates
    apps = [App(host, name) for name in list_apps(host) if certificates.is_on(name)]
    rows = []
    if apps and not host.ask(['which', 'openssl']).out:     # all else would be of that
        return [('openssl is missing: it reads certificates',
                 'apt-get update; apt-get install openssl')]
    if any(wanted_names(app) for app in apps):
        rows += certbot_problems(host)
    if certificates.are_any():
        others = mode_of(host.path(CERTIFICATES)) & 0o077
        rows.append((others and 'others may read the keys in ' + CERTIFICATES,
                     'chmod 700 ' + CERTIFICATES))

    for app in apps:
        rows += https_problems_of(app)
    return rows

def https_problems_of(app):
    """The same for one app that is to have https."""
    host = app.host
    certificates = host.certificates
    retry = 'sudo dockhand https ' + app.name
    rows = []
    if certificates.is_there(certificates.own_path(app.name)):
        ends = own_ends_text(host, certificates.own_path(app.name))
        rows.append((ends and '%s: %s' % (app.name, ends), retry + ' --cert'))
    rows += [name_problem(app, name, retry) for name in wanted_names(app)]

    live = app.live()
    if live is not None:
        rows.append(form_problem_row(app, live))
        rows += [(served_problem(host, certificate, names),
                  'nginx -t && nginx -s reload')
                 for certificate, names in certificates.uses(app.name, live.proxy)
                 if certificate.path in host.text(proxy_path(app.name))]
    return rows

def certbot_problems(host):
    """What keeps certbot from renewing: rows for `demand`."""
    bring = 'apt-get update; apt-get install certbot'
    if not host.certificates.has_certbot():
        if is_upstart(host):
            return [(OLD_HOST, 'dockhand https APP --cert')]
        return [('certbot is missing: no certificate will be renewed', bring)]
    status, out, err = host.ask(['certbot', '--version'])
    if status:
        return [('certbot does not run: ' + last_line(err or out), bring)]

    if is_systemd(host):
        state = host.ask(['systemctl', 'is-active', 'certbot.timer']).out.strip()
        return [(state != 'active' and 'certbot.timer, which renews, is ' + state,
                 'systemctl enable --now certbot.timer')]
    has_line = os.path.exists(host.path('/etc/cron.d/certbot'))
    has_cron = bool(host.ask(['which', 'cron']).out)
    return [(not (has_line and has_cron) and 'nothing runs `certbot renew`',
             'apt-get install cron; apt-get install --reinstall certbot')]

def name_problem(app, name, retry):
    """What is wrong with the certificate for a name, or '', and what to type: a row for
    `demand`. retry: the command that gets it"""
    certificates = app.host.certificates
    noted = certificates.noted(name).get('why', 'there was no try yet')
    if not certificates.is_there(certificates.path(name)):
        return '%s has no certificate: %s' % (name, noted), retry
    if not certificates.is_renewed(name):
        return 'nothing renews the certificate of ' + name, retry
    if not certificates.is_newest(name):
        return ('certbot has renewed the certificate of %s, and nginx has the old one'
                % name, retry)
    elsewhere = where_it_leads(app, live_proxy(app), name)
    if elsewhere:
        return ('%s leads %s, and so will not be renewed' % (name, elsewhere),
                'point it here in DNS, or: sudo dockhand config %s domains="..."'
                % app.name)

    x509 = certificates.read(certificates.path(name))
    if x509 is None:
        return 'openssl cannot read the certificate of ' + name, retry
    if certificates.is_late(name):
        log_text = app.host.text('/var/log/letsencrypt/letsencrypt.log')
        why = renewal_reason(log_text, LINEAGE + name)
        days = certificates.days_left(x509)
        return ('the certificate of %s ends in %d days, and is not renewed: %s' % (
            name, days, why or 'certbot says nothing of it'), retry)
    return '', retry

def served_problem(host, certificate, names):
    """Whether nginx serves another Certificate than the file holds, in words, or ''.
    names: server names that it is used for"""
    name = names[0].replace('*', 'any', 1)
    argv = ['timeout', '5', 'openssl', 's_client', '-connect', '127.0.0.1:443',
            '-servername', name]

    served = pem_blocks(host.ask(argv).out)
    held = [block for block in pem_blocks(host.text(certificate.path))
            if block.startswith('-----BEGIN CERTIFICATE-----')]
    if served[:1] == held[:1]:
        return ''
    return 'nginx serves another certificate for %s than %s has' % (
        name, certificate.path)

def form_problem_row(app, live):
    """That an app goes on without https, and what to do: a row for `demand`."""
    certificates = app.host.certificates
    problem = form_refused(app, live)
    own = certificates.own_path(app.name)
    if own in problem:
        return problem, 'sudo rm %s; sudo dockhand https %s' % (own, app.name)
    if CERTIFICATES in problem:
        return problem, 'sudo dockhand https ' + app.name
    return problem, 'change what it says of that in nginx-proxy.conf, and push'

def form_refused(app, live):
    """What nginx says against an app's proxy file with https alone, or ''."""
    text = app.wanted_proxy(live)
    form = app.nginx.form(app.name, text)
    if form in (text, app.host.text(proxy_path(app.name))):
        return ''
    with host_lock(app.host):
        problem = app.nginx.form_problem(app.name, form, app.nginx.files())
    return problem and '%s is served without https: %s' % (app.name, problem)

def answer_problem(app, live):
    """What is wrong with what nginx answers for a live app, or None."""
    if not live.proxy or app.is_stopped():
        return None
    place = plain_place(read_proxy_file(live.proxy).servers)
    if place is None:
        return None

    name, port = place
    is_tls = SPEAKS_TLS and name in app.host.certificates.secured(app.name, live.proxy)
    if is_tls:                          # by http it is only sent on
        port = 443
    status = fetch_status(app.host, name, port, is_tls=is_tls)
    if status in ('401', '403', '404') and is_made(live):
        # a made file says none of these: does the app, or another one's file?
        direct = status_by_itself(app, live, name)
        if direct not in (None, status):
            return '%s answers %s through nginx, and %s by itself' % (
                live.app, status, direct)
    if not status.isdigit() or status in ('400', '444', '502', '503', '504'):
        return '%s answers %s through nginx' % (live.app, status)
    return None

def status_by_itself(app, live, name):
    """What a live app answers without nginx; None where it runs nowhere."""
    ports = engine_of(app, live).state(live).ports
    if not ports:
        return None
    address, port = ports[0]
    return fetch_status(app.host, name, port, address=address)

def machine_problems(host):
    """What is wrong with other machines: rows for `demand`."""
    rows = []
    spread = spread_apps(host)
    for machine in host.machines.all():
        found = describe_machine(host, machine)
        name = printable(machine.name)
        if not is_up(machine):
            remedy = 'power it on'
            if not machine.is_active:
                remedy = 'docker node update --availability active ' + name
            rows.append(('%s is %s' % (name, found['state']), remedy + ', or: sudo '
                         'dockhand machines remove ' + name))
            continue
        if found['disk_free'] is None:
            rows.append(('%s cannot be reached by ssh' % name,
                         'ssh root@' + machine.address))
        elif found['disk_free'] < SPACE * 1000000:
            rows.append(('%s has %s free' % (name, size_text(found['disk_free'])),
                         'ssh root@%s docker image prune' % machine.address))

        lacking = [live.app for live in spread if lacks_image(machine, live)]
        if lacking:
            rows.append(('%s lacks the image of %s' % (name, ' '.join(lacking)),
                         'sudo dockhand machines'))
    return rows

def lacks_image(machine, live):
    """Whether a live release is to run on a machine too, and cannot."""
    if machine.address not in live.machines:
        return False
    return machine.labels.get(machine_label(live)) != live.image

def nginx_problem(host):
    """What nginx says against its files: a row for `demand`."""
    problem = host.nginx.problem()
    if CERTIFICATES in problem:
        return problem, 'sudo dockhand recover'
    return problem, 'edit that file, then nginx -t'

def unread_files(host):
    """[PATH:LINE: what] of nginx's own files that names may stand in unread."""
    return ['%s:%d: %s' % (path, line, text)
            for path, file in sorted(host.nginx.files().items())
            for line, text in file.troubles]

def nginx_advice(host):
    """How to start nginx, and how to have systemd start it after a crash: a file for that
    is not ours to write."""
    advice = 'service nginx start || sudo dockhand recover'
    if not is_systemd(host):
        return advice
    folder = UNITS[0] + '/nginx.service.d'
    return (advice + '; so that systemd does it the next time: mkdir -p %s; '
            "printf '[Service]\\nRestart=on-failure\\n' >%s/restart.conf; systemctl "
            'daemon-reload' % (folder, folder))

# ---- Commands: what people run, each with its line of help -----------------------------
# For root at the server, and for whoever has a key, by ssh. Each stands under its name,
# the words that it takes, and what right to an app, or to the server, it wants.

# pattern: the words after the name; [X] may be left out, [-x] is a flag, [-x Y] takes a
# value. Where it begins with APP, the function gets an App, else the Host. right: what a
# key has to have for it; alone: the same where nothing is said that may be left out.
Verb = namedtuple('Verb', 'name pattern right alone function')
COMMANDS = []                       # in the order in which they are listed
READ, CHANGE, ADMIN, ROOT = 'read', 'change', 'admin', 'root'

def command(name, pattern='', right=ROOT, alone=None):
    """Make a function a command of this name; its docstring is what the list says."""
    def enlist(function):
        COMMANDS.append(Verb(name, pattern, right, alone or right, function))
        return function
    return enlist

def own_connection(host):
    """The Connection by which somebody came here, or None. sudo drops what sshd says of
    it: a process above this one has it."""
    pid = str(os.getpid())
    while pid.isdigit() and int(pid) > 1:
        try:
            environment = host.text('/proc', pid, 'environ')
        except EnvironmentError:        # not even for root, in some containers
            environment = ''
        for line in environment.split('\0'):
            if line.startswith('SSH_CONNECTION='):
                return parse_connection(line.partition('=')[2])
        pid = ''.join(process_fields(host, pid)[1:2])
    return None

# Installing, and keys

@command('install', '[--user NAME]')
def cmd_install(host, user=None):
    """make this machine ready, or bring it up to date

    --user takes another name than git for the user that is pushed to.
    """
    if user is not None:
        # The rules for apps will do, and keep out names that services have.
        host.user = user if user == 'git' else check_app_name(user)
    demand(requirements(host))

    changed = ensure_account_and_folders(host)
    changed |= install_parts(host)
    hooks_changed, failed = install_hooks(host)
    changed |= hooks_changed

    if changed or host.nginx.master() is None:
        host.nginx.reload()
    if changed:
        for name in list_apps(host):
            attempt(name, settle_again, App(host, name))
        log('install by %s', host.person())
    demand([(sudo_problem(host), 'visudo')])
    if failed:
        raise Failure('%d file(s) could not be written; type: chown -R %s: %s',
                      len(failed), host.user, os.path.dirname(failed[0]))

    if not changed:
        tell('nothing changed')
    elif read_keys(host):
        tell('dockhand is installed')
    else:
        tell('dockhand is installed; next: cat ~/.ssh/id_ed25519.pub | ssh THIS-HOST '
             '"sudo dockhand upload-key NAME"')

def ensure_account_and_folders(host):
    """Make the git user, and the folders that its apps want; True where one was new."""
    changes = [ensure_user(host), ensure_token(host),
               make_folder(host.path(STATE, 'apps')),
               make_folder(host.path(STATE, 'build'), 0o700, host.account()),
               make_folder(host.path(STREAMS), 0o711)]
    if not os.path.isdir(host.path('/var/cache/nginx')):
        changes.append(make_folder(host.path('/var/cache/nginx')))
    return any(changes)

def install_parts(host):
    """Write our files, and have this machine start and read them; True where one was
    new or another."""
    changes = [disable_default_site(host)]
    with host_lock(host):       # one of them is nginx's, for all apps
        for part in installed_parts(host):
            changes.append(install_part(host, *part))
    changes += [renew_keys(host), replace_link(host.path(OLDER_NAME), PROGRAM),
                enable_at_boot(host), compile_script(host)]
    return any(changes)

def install_hooks(host):
    """Write the hooks of the repositories that are there: (whether one was another, the
    paths of those that could not be written)."""
    changes = []

    def install_now(part):
        changes.append(install_part(host, *part))
    failed = [part.path for part in installed_hooks(host)
              if not attempt(part.path, install_now, part)]
    return any(changes), failed

def renew_keys(host):
    """Give the lines of our keys what this version writes beside their command; True
    where that changes one."""
    text = host.as_git(read_file, host.path(host.home(), KEYS)) or ''
    lines = read_authorized_keys(text)
    if [renewed(line) for line in lines] == lines:
        return False
    change_keys(host, lambda lines: [renewed(line) for line in lines])
    return True

def read_stdin():
    """What is piped in, '' from a terminal; Failure where it is too much."""
    source = sys.stdin if PYTHON_2 else sys.stdin.buffer
    data = b'' if source.isatty() else source.read(FILE_LIMIT + 1)
    refuse_if(len(data) > FILE_LIMIT, 'what came in is larger than 256 KB')
    refuse_if(is_hung_up(), 'the connection broke while something came in: '
              'nothing has changed')
    return to_text(data)

@command('upload-key', 'NAME [APP...] [--read-only] [--admin]', ADMIN)
def cmd_upload_key(host, name, *apps, **options):
    """let the public keys on standard input in

    APP may be pushed and managed alone, and `shop-` is every app that begins so;
    --read-only: fetch, logs and states; --admin: keys, doctor and recover too.
    All keys of a name have the rights that were said last.
    """
    check_key_name(name)
    words = apps + tuple(word for word, is_said in (
        (ONLY_READS, 'read_only' in options), (IS_ADMIN, 'admin' in options)) if is_said)
    check_rights(words)
    uploaded = parse_public_keys(read_stdin())
    for kind, blob in uploaded:
        refuse_if(not fingerprint(host, kind, blob), '"%s" is no key that OpenSSH here '
                  'knows: make one with ssh-keygen -t ecdsa',
                  printable(kind + ' ' + blob, 40))

    change_keys(host, lambda lines: add_keys(lines, uploaded, name, words))
    said = rights_text(read_rights(words))
    for kind, blob in uploaded:
        tell('%s %s %s %s', name, kind, fingerprint(host, kind, blob), said)
    log('key %s: %s: upload-key by %s', name, said, host.person())

def fingerprint(host, kind, blob):
    """A key's, by this server's own ssh-keygen; '' where its sshd will not know it."""
    import tempfile
    with tempfile.NamedTemporaryFile(suffix='.pub') as file:
        file.write(to_bytes('%s %s\n' % (kind, blob)))
        file.flush()
        status, out, _ = host.ask(['ssh-keygen', '-l', '-f', file.name])
    return '' if status else out.split()[1]

@command('keys', '[--json]', ADMIN)
def cmd_keys(host, json=False):
    """list the keys: type, fingerprint, last use, rights"""
    found = [(key, describe_key(host, key, last_use(host, key.name)))
             for key in read_keys(host)]
    if json:
        return tell_json([each for _, each in found])
    for key, each in found:
        used = 'never used' if each['used'] is None else time_text(each['used'])
        tell('%-20s %-20s %s  %-16s  %s', printable(key.name), printable(key.type),
             each['fingerprint'] or '(unknown to OpenSSH here)', used,
             printable(words_text(key.words), 8000))

def last_use(host, name):
    """When a key of a name came last, in seconds since 1970, or None."""
    path = host.path(host.home(), USES, name)
    return int(os.lstat(path).st_mtime) if os.path.lexists(path) else None

@command('remove-key', 'NAME', ADMIN)
def cmd_remove_key(host, name):
    """take the right to come in away from a name"""
    keys = [key for key in read_keys(host) if key.name == name]
    refuse_if(not keys, 'no key is named "%s": dockhand keys', printable(name))

    lines = change_keys(host, lambda lines: remove_keys(lines, name))
    log('key %s: remove-key by %s', name, host.person())
    tell('%s may push no longer', name)
    for number in lines_that_log_in(lines, keys):
        tell('but %s:%d is not of dockhand, and lets the same key log in as %s',
             host.home() + '/' + KEYS, number, host.user)

# What runs

@command('apps', '[--json]', READ)
def cmd_apps(host, json=False):
    """list the apps: state, commit, since when, address"""
    found = describe_apps(host)
    if json:
        return tell_json(found)
    for each in found:
        tell(app_line(each))

def describe_apps(host):
    """[what describe_app gives] of each app that whoever asks may know of."""
    here = web_address(own_connection(host)) or '127.0.0.1'
    return [describe_app(App(host, name), here) for name in seen_apps(host)]

@command('status', '[APP] [--json]', READ)
def cmd_status(host, name=None, json=False):
    """all of an app on one screen; alone: the server"""
    if name is None:
        found = dict(describe_server(host), apps=describe_apps(host))
        lines = server_lines(found) + [app_line(each) for each in found['apps']]
    else:
        app = App(host, check_app_name(name))
        refuse_if(name not in all_apps(host), 'no app %s here: see dockhand apps', name)
        here = web_address(own_connection(host)) or '127.0.0.1'
        found = describe_status(app, here)
        lines = status_lines(found, host.clock.time())
    if json:
        return tell_json(found)
    for line in lines:
        tell(line)

@command('logs', 'APP [PROCESS] [-f] [-n N] [--since TIME]', READ)
def cmd_logs(app, process=None, n=None, f=False, since=None):
    """show what an app prints

    -f goes on, over deploys too; -n N begins with the last N lines, 100 otherwise;
    --since 30m, 2h, 1d or a date. PROCESS is one of the Procfile: `worker` is all of
    that type, `worker.2` the second.
    """
    refuse_if(n is not None and not re.match(r'[0-9]{1,9}\Z', n), '-n wants a number')
    if app.is_waiting():
        raise Failure('%s was never live; it waits %s', app.name, app.waiting_text())
    live = app.must_be_live()
    if process is not None:
        process_called(live, process)
    readers = log_readers(app, live, process)
    if not readers:
        refuse_if(since, '--since: the log of a job of init has no times')
        words = engine_of(app, live).logs_command(live, n or '100', *['-F'] if f else [])
        os.execvpe(words[0], words, dict(os.environ, **ENVIRONMENT))

    begun = time_for_docker(app.host.clock.time())
    options = ['--tail=' + (n or ('all' if since else '100'))]
    if since is not None:
        options.append('--since=' + read_since(since))
    try:
        show_logs(readers, options)
        if f:
            Follower(app, live, process, readers, begun).follow()
    except EnvironmentError:
        refuse_if(not is_hung_up(), 'the log of %s cannot be shown', app.name)

def read_since(text):
    """`docker logs --since` for 30m, 2h or 1d, or a date that it takes as it is."""
    match = re.match(r'([0-9]{1,6})([smhd])\Z', text)
    if match:
        number, unit = match.groups()
        return '%dh' % (int(number) * 24) if unit == 'd' else text
    refuse_if(not is_date(text),
              '--since wants 30m, 2h or 1d, or a date as 2026-01-31T06:00:00')
    return text

# A day, and a moment of it in some zone
DATE = r'''(?x) ([0-9]{4}-[0-9]{2}-[0-9]{2})
    (?:T ([0-9]{2}:[0-9]{2}(?::[0-9]{2})?) (?:\.[0-9]{1,9})?
       (?:Z | [+-](?:0[0-9]|1[0-4]):[0-5][0-9])? )? \Z'''

def is_date(text):
    """Whether docker takes a text for a date. Of one that it does not it says so where
    nobody looks, in the log that is asked for."""
    from datetime import datetime
    match = re.match(DATE, text)
    if match is None:
        return False

    day, moment = match.groups()
    if moment is None:
        moment = '00:00:00'
    elif len(moment) == len('00:00'):
        moment += ':00'
    try:
        datetime.strptime('%s %s' % (day, moment), '%Y-%m-%d %H:%M:%S')
    except ValueError:
        return False
    return True

def process_called(live, title):
    """The Process that a person means by `worker` or `worker.2`."""
    processes = processes_of(live)
    known = dict((title_of(process), process) for process in processes)
    refuse_if(title not in known, 'no process of %s is called %s: %s', live.app,
              printable(title), ' '.join(title_of(process) for process in processes))
    return known[title]

def start_live(app, live, is_restart=False):
    """Start a live release and see it answer. One that was stopped is so again where it
    does not; another one docker goes on starting."""
    engine = engine_of(app, live)
    with undone_by(settle_or_stop, app, live):
        log_end = None              # of one that runs already the whole log is shown
        engine.end_stops(live)
        down = part_to_stop(engine, live, is_restart)
        if down is not None:
            engine.stop(down)       # what is left of it holds its port and its name
            log_end = engine.log_end(live)

        engine.place(live)
        engine.start(live)
        check_or_show_log(app, live, log_end)
        if app.is_stopped():
            turn_proxy(app, live, live.proxy)
    finish(app, live, git_moves_branch=False)

def part_to_stop(engine, live, is_restart):
    """What of a release is stopped before its start, a Release; None for nothing."""
    if is_restart:
        return live
    if engine.state(live).alive:
        return None
    return down_part(engine, live) or live      # init may be starting all for ever

def settle_or_stop(app, live):
    """After a start that failed: what is to run is docker's again, what was stopped is so
    again."""
    engine = engine_of(app, live)
    if not app.is_stopped():
        return engine.settle(live)
    engine.stop(live)
    turn_proxy(app, live, app.wanted_proxy(live))

@command('run', 'APP [--process TYPE] [COMMAND...]', CHANGE)
def cmd_run(app, *words, **options):
    """run a command, or a shell, beside the app

    In a new container of the live release, with its config, volumes and network; the
    container goes with the command. --process TYPE alone runs what the Procfile says of
    that type. A terminal wants `ssh -t`; a pipe or `$`: run APP sh -c '...'.
    """
    title = options.get('process')
    if title is not None:
        process = process_called(app.must_be_live(), title)
        words = words or tuple(process.command or ())
        refuse_if(not words, '%s of %s is what its image runs: say a command', title,
                  app.name)

    return run_one_off(app, list(words), has_terminal())

@command('enter', 'APP [PROCESS] [COMMAND...]', CHANGE)
def cmd_enter(app, *words):
    """run a command, or a shell, inside what runs

    PROCESS is one of the Procfile, the first otherwise.
    """
    live = app.must_be_live()
    engine = engine_of(app, live)
    containers = OrderedDict((title_of(process), process)
                             for process in engine.logged(live))
    inside = list(words)
    if words and words[0] in containers:
        title = inside.pop(0)
    elif containers:
        title = list(containers)[0]
    else:                               # of init's the name is not ours
        running = app.docker.running(live.image)
        refuse_if(not running, '%s does not run', app.name)
        return enter(app, running[0]['Id'], inside, has_terminal())

    name = engine.container_here(containers[title])
    runs = any(container['State']['Running'] for container in app.docker.inspect(name))
    refuse_if(not runs, '%s of %s does not run: see dockhand status %s', title,
              app.name, app.name)
    return enter(app, name, inside, has_terminal())

@command('restart', 'APP', CHANGE)
def cmd_restart(app):
    """stop an app and start it again"""
    with live_app(app, 'restart') as live:
        log('%s: restart by %s', app.name, app.host.person())
        app.docker.check_takes_writes(app.name)
        start_live(app, live, is_restart=True)
    tell('%s runs', app.name)

@command('stop', 'APP', CHANGE)
def cmd_stop(app):
    """stop an app, until a start or another release

    It stays so over a reboot; nginx answers 503 meanwhile.
    """
    with live_app(app, 'stop') as live:
        log('%s: stop by %s', app.name, app.host.person())
        stop_live(app, live)
    tell('%s is stopped', app.name)

@command('start', 'APP', CHANGE)
def cmd_start(app):
    """start an app that was stopped"""
    with live_app(app, 'start') as live:
        log('%s: start by %s', app.name, app.host.person())
        start_live(app, live)
    tell('%s runs', app.name)

# Its releases

@command('releases', 'APP [--json]', READ)
def cmd_releases(app, json=False):
    """list an app's releases, and what became of each"""
    live = None if app.is_waiting() else app.must_be_live()
    releases = [app.load(number) for number in reversed(app.numbers())]
    found = [describe_release(release, live) for release in releases if release.commit]
    if json:
        return tell_json(found)
    if not releases:
        tell('%s waits for its first push', app.name)
    for each in found:
        tell(release_line(each))

@command('rollback', 'APP [N]', CHANGE)
def cmd_rollback(app, number=None):
    """go back to an earlier release, its config too

    To the one that was live before, or to release N: see `releases`.
    """
    with live_app(app, 'rollback') as live:
        release, is_ready = earlier_release(app, live, number)
        check_edited(app, live, release)
        step('Switching from release %d to %d', live.number, release.number)
        revived = {'by': app.host.person(), 'time': round(app.host.clock.time(), 2)}
        went = apply(app, live, release._replace(revived=revived), is_ready)
        step('Release %d is live again: %s', release.number, went)

        settings = changed_keys(live.config, release.config)
        if settings:
            step('Its config too, for later pushes as well: %s', ' '.join(settings))

        log('%s: release %d of %s is live again: rollback from %d by %s', app.name,
            release.number, release.commit, live.number, app.host.person())
    attempt('https', get_and_tell, app)         # its names may be others
    show_address(app, release, own_connection(app.host))

def earlier_release(app, live, number):
    """The kept Release that a rollback goes to, and whether its containers are there as
    they were left; Failure if it cannot run any more. number: a str, or None for the one
    before"""
    releases = [release for release in app.kept() if release.number != live.number]
    if number is not None:
        releases = [release for release in releases if str(release.number) == number]
    wanted = 'release ' + printable(number) if number else 'other release'
    refuse_if(not releases, 'no %s to go back to: see dockhand releases %s', wanted,
              live.app)

    release = releases[0]
    tag = image_tag(release)
    names = [process.name for process in engine_of(app, release).own(release)]
    found = app.docker.inspect(tag, *names)
    containers = [each for each in found if 'State' in each]
    images = [each['Id'] for each in found if each not in containers]
    refuse_if(images != [release.image],
              'its image %s was removed, so nothing has changed: choose another', tag)
    left = [each for each in containers if restart_policy(each) == 'no']
    return with_places_of_now(app, release), len(left) == len(names)

@command('rebuild', 'APP [--pull]', CHANGE)
def cmd_rebuild(app, pull=False):
    """build the live commit again, as a new release

    --pull fetches newer base images.
    """
    with app_lock(app, 'dockhand rebuild ' + app.name) as live:
        branch, commit = what_to_rebuild(app, live)
        release = new_release(app, branch, commit, app.host.person(), 'rebuild')
        make_release(app, live, release, options=['--pull'] if pull else [])
    after_push(app, own_connection(app.host))

def what_to_rebuild(app, live):
    """(branch, commit) of what is live; where nothing ever was, as after an import that
    failed, what the branch has that is deployed."""
    if live is not None:
        return live.branch, live.commit
    if os.path.isdir(app.repository()):
        for branch in deployed_branches(app.config().get('branch')):
            commit = app.read_branch('refs/heads/' + branch)
            if commit:
                return branch, commit
    raise Failure('no app %s is live here: see dockhand apps', app.name)

# What only this server knows

@command('proxy', 'APP', READ)
def cmd_proxy(app):
    """print the proxy file that is made for an app

    To start one of its own from: nginx-proxy.conf.
    """
    live = app.must_be_live()
    refuse_if(not live.web, '%s is no web app that its Dockerfile describes: push it '
              'without an upstart.conf first', app.name)
    text = complete_proxy(app, live._replace(proxy=''))
    tell.write(text.partition('\n')[2].partition(MARK)[0].rstrip() + '\n')

@command('config', 'APP [KEY=VALUE...] [--unset] [--env] [--next] [--values]', CHANGE,
         alone=READ)
def cmd_config(app, *changes, **options):
    """print or change what only this server knows

    KEY=VALUE is a variable of the app, or a word of dockhand's in small letters, as
    domains="shop.example.com"; KEY=- takes the value from standard input, - alone a file
    of variables. --values shows the values too; --env: all are variables; --next: note it
    for the next push, where the live commit could not have it, as a folder that is new.
    """
    if not changes:
        if set(options) - set(['values']):
            raise Usage('wanted: config APP KEY=VALUE, or APP --unset KEY')
        refuse_if(app.name not in all_apps(app.host), 'no app %s here: see dockhand apps',
                  app.name)
        return show_config(app.config(), 'values' in options)
    # Before the lock, or everybody else waits for that
    piped = read_stdin() if piped_words(changes) else ''
    with app_lock(app, 'dockhand config ' + app.name) as live:
        before = app.config()
        wanted = change_config(before, changes, unset='unset' in options,
                               env='env' in options, piped=piped)
        changed = changed_keys(before, wanted)

        if not changed:
            tell('nothing changed')
        elif live is None or 'next' in options:
            build_options(wanted)           # or Failure: no push would build with them
            if 'options' in changed and 'options' in wanted:
                check_options(app, wanted['options'])
            names = noted_names(app)
            app.save_config(wanted)
            give_certificates_back(app, set(names) - set(noted_names(app)))
            log('%s: config %s by %s', app.name, ' '.join(changed), app.host.person())
            tell('%s: noted for its %s push', app.name, 'next' if live else 'first')
        else:
            release_config(app, live, wanted, changed)
    if live is not None and 'domains' in changed:
        attempt('https', get_and_tell, app)
        show_address(app, app.live(), own_connection(app.host))

def show_config(config, with_values):
    """Print what is set; a variable's value may be a secret."""
    for key in sorted(config):
        shown = with_values or key in SETTINGS
        tell.write('%s=%s\n' % (key, config[key] if shown else '(see it with --values)'))

def spread_anew(host):
    """A release, as of a change of config, of each app that runs on a machine which has
    gone, or that is to run on all and does not."""
    there = set(host.machines.addresses())
    for live in spread_apps(host):
        app = App(host, live.app)
        if is_misplaced(live, there) and not app.is_stopped():
            attempt(app.name, release_again, app, there)

def is_misplaced(live, there):
    """Whether a live release is not on the machines that it is to be on. there: a set of
    their addresses"""
    gone = set(live.machines) - there
    lacking = there - set(live.machines)
    if gone:
        return True
    return bool(lacking) and live.config.get('machines') == 'all'

def release_again(app, there):
    """A release of what is live, with the same config; what was noted for the next push
    stays noted. there: as is_misplaced has it"""
    with live_app(app, 'machines') as live:
        if not is_misplaced(live, there):       # another command was quicker
            return
        noted = app.config()
        step('%s: on other machines from now on', app.name)
        release_config(app, live, live.config, ['machines'])
        app.save_config(noted)

def release_config(app, live, wanted, changed):
    """Make a release of the live image with another config. changed: [key]"""
    has_own_file = live.job or live.proxy and not is_made(live)
    refuse_if(has_own_file and 'domains' in changed and 'domains' in wanted,
              'the domains of %s are the server_name of its own nginx-proxy.conf',
              app.name)
    refuse_if(has_own_file and 'trust' in changed and 'trust' in wanted,
              'whom %s trusts stands in its own nginx-proxy.conf', app.name)
    check_edited(app, live, live)
    if live.job and '/apps/%s/env' % app.name not in live.job:
        step('Note: its upstart.conf has no `--env-file %s/apps/%s/env`: it sees no '
             'variable', STATE, app.name)

    branch = wanted.get('branch', live.branch)
    if 'branch' in changed and 'branch' not in wanted:
        branch = DEFAULT_BRANCHES[0]
    if 'branch' in changed:
        check_branch_fits(app, branch)
    release = new_release(app, branch, live.commit, app.host.person(),
                          'config ' + ' '.join(changed))
    release = release._replace(config=wanted)
    if is_built_alike(live.config, wanted):
        release = release._replace(
            image=live.image, layers=live.layers, job=live.job, proxy=live.proxy,
            procfile=live.procfile, crontab=live.crontab)
    make_release(app, live, release)
    clean_up(app, app.live())

def check_branch_fits(app, branch):
    """Failure where git cannot have a branch beside those that are there: a name is a
    file or a folder to it."""
    act = app.host.ask
    there = app.git('for-each-ref', '--format=%(refname)', 'refs/heads/', act=act)
    for ref in there.out.split():
        name = ref[len('refs/heads/'):]
        clashes = (name + '/').startswith(branch + '/') or (
            branch + '/').startswith(name + '/')
        refuse_if(clashes and name != branch, 'branch=%s: git cannot have it beside the '
                  'branch %s, which is here', branch, printable(name))

def piped_words(changes):
    """Those of the words of `config` that take what is piped in: one of them, or none."""
    piped = [word for word in changes if word == '-' or word.partition('=')[2] == '-']
    refuse_if(len(piped) > 1, 'only one KEY=- at a time: the next would find nothing')
    return piped

def change_config(config, changes, unset=False, env=False, piped=''):
    """What words make of a config: a new one. changes: KEY=VALUE, KEY=- and `-` for what
    is piped in, or, to unset one, KEY; env: all of them are variables; piped: the text"""
    unsets = [word for word in changes if '=' not in word and word != '-']
    refuse_if(unset and not unsets, '--unset wants KEY, as in --unset WORKERS')
    wanted = dict(config)
    for word in changes:
        name, equals, value = word.partition('=')
        if word == '-':
            for name, value in read_env_file(piped):
                wanted[variable_key(name)] = value
        elif equals:
            if value == '-':
                value = re.sub(r'\r?\n\Z', '', piped)
            wanted[checked_key(config, name, value, env)] = value
        else:
            refuse_if(not unset, '"%s" is not KEY=VALUE (what has blanks is quoted, over '
                      "ssh twice: 'KEY=\"a b\"')", printable(word))
            keys = [key for key in (key_meant(wanted, name, env), variable_key(name))
                    if key in wanted]
            refuse_if(not keys, 'no %s is set', printable(word))
            del wanted[keys[0]]
    return wanted

def checked_key(config, name, value, env):
    """The key of a config that somebody means by a name; Failure where it cannot have
    this value."""
    key = key_meant(config, name, env)
    if key.startswith(ENV):
        check_variable(name, value)
    else:
        check_setting(key, value)
    return key

def key_meant(config, name, env):
    """The key for a name that somebody typed: a word that is no setting may be a variable
    that an app has from the time when any was taken."""
    is_older = name not in SETTINGS and variable_key(name) in config
    return variable_key(name) if env or is_older else name

# Https

@command('https', '[APP] [--off] [--cert]', CHANGE, alone=READ)
def cmd_https(host, name=None, off=False, cert=False):
    """answer by https; alone: what each name has

    --off: by http alone again; --cert: by the certificate and key that are piped in.
    """
    if name is None:
        if off or cert:
            raise Usage('wanted: https APP')
        return list_https(host)

    app = App(host, check_app_name(name))
    if off and cert:
        raise Usage('wanted: --off or --cert')
    if off:
        return turn_https_off(app)
    if cert:
        return bring_certificate(app)
    turn_https_on(app)

def turn_https_on(app):
    """Have an app answer by https, and get the certificates for that."""
    certificates = app.host.certificates
    live = app.live()
    names = https_names(app)
    if live is not None or 'domains' in app.config():
        refuse_if(not names, no_full_name_text(app, live))
    wanted = wanted_names(app)
    missing = [name for name in wanted if not certificates.is_renewed(name)]
    refuse_if(missing and not certificates.has_certbot(), certificates.no_certbot_text())
    check_holds_ours(app, live)

    note_https(app)
    use_certificates(app)               # or no authority is let in
    get_certificates(app, is_asked=True)
    for name in names:
        tell('%s: %s', name, https_text(app, name))
    if not names:
        tell('%s: noted; its certificates are got with its first push', app.name)

def no_full_name_text(app, live):
    """Why there is nothing to certify, and what to do."""
    if live is not None and not live.proxy:
        return '%s is no web app' % app.name

    servers = servers_of(live.proxy) if live else []
    if any(listens_on_443(server) for server in servers):
        return 'its nginx-proxy.conf listens on 443 itself, with certificates of its own'
    if live is not None and not is_made(live):
        return ('a certificate wants a full name, on a server that listens on port 80 '
                'alone: write it as server_name in nginx-proxy.conf')
    return ('a certificate wants a full name: dockhand config %s domains="..."'
            % app.name)

def note_https(app):
    """Write down that an app is to have https."""
    with app_lock(app, 'dockhand https ' + app.name):
        make_folder(app.folder(), 0o700)
        if replace_file(app.folder('https'), ''):
            log('%s: https by %s', app.name, app.host.person())
        make_folder(app.host.path(CERTIFICATES), 0o700)

def turn_https_off(app):
    """Have an app answer by http alone. Its certificates stay, and are renewed."""
    with app_lock(app, 'dockhand https ' + app.name):
        was_on = remove_file(app.folder('https'))
        if was_on:
            log('%s: https --off by %s', app.name, app.host.person())
            remove_if_empty(app.folder())       # as of a name that was typed wrong
    if app.live() is not None:
        use_certificates(app)
    tell('%s: %s', app.name, 'http again' if was_on else 'nothing changed')

def bring_certificate(app):
    """Take a chain and its key from standard input, for the names that it is good for."""
    certificates = app.host.certificates
    text = ordered_pem(read_stdin())
    check_holds_ours(app, app.live())
    path = certificates.own_path(app.name)
    trial = '%s/.%s.pem.trial' % (STATE, app.name)
    try:
        replace_file(app.host.path(trial), text, 0o600)
        certificates.check_pair(app.host.path(trial))
        x509 = certificates.read(trial)
        covered = covered_names(app, x509)
        check_nginx_takes(app, Certificate(trial, x509.names))
        certificates.keep(path, text)
    finally:
        remove_file(app.host.path(trial))

    note_https(app)
    use_certificates(app)
    log('%s: https --cert by %s', app.name, app.host.person())
    for name in covered:
        tell('%s: %s', name, https_text(app, name))

def ordered_pem(text):
    """A chain and its key, the key last, as nginx wants them; Failure where one is
    missing, or the key has a passphrase."""
    blocks = pem_blocks(text)
    chain = [block for block in blocks if block.startswith('-----BEGIN CERTIFICATE-----')]
    keys = [block for block in blocks if ' PRIVATE KEY-----' in block]

    refuse_if(not chain or len(keys) != 1, 'the certificate, its chain and its one key '
              'are wanted, as PEM: cat fullchain.pem key.pem | ...')
    refuse_if('ENCRYPTED' in keys[0], 'the key has a passphrase, for which nobody is '
              'there when nginx starts: openssl pkey -in key.pem')
    return '\n'.join(chain + keys) + '\n'

def covered_names(app, x509):
    """The names of an app that a certificate is good for; Failure where that is none, or
    it is not good now. x509: an X509, or None"""
    refuse_if(x509 is None, 'openssl cannot read this certificate')
    now = app.host.clock.time()
    refuse_if(x509.ends <= now, 'this certificate ended on %s', time_text(x509.ends))
    refuse_if(x509.begins > now, 'this certificate begins on %s', time_text(x509.begins))

    live = app.live()
    names = noted_names(app) if live is None else plain_names(live.proxy or '')
    covered = [name for name in names if is_covered_by(name, x509.names)]
    refuse_if(not covered, 'this certificate is good for %s: none of that is a name of '
              '%s, which has %s', printable(' '.join(x509.names) or 'no name'), app.name,
              printable(' '.join(names) or 'no full name'))
    return covered

def check_nginx_takes(app, certificate):
    """Failure where nginx takes no such certificate: of a weak key, say."""
    live = app.live()
    if live is None or not live.proxy:
        return

    text = app.wanted_proxy(live)
    form = with_https(text, [certificate], app.nginx.version())
    with host_lock(app.host):
        files = app.nginx.files()
        problem = app.nginx.form_problem(app.name, form, files)
        refuse_if(problem and not app.nginx.test(app.name, text, files),
                  'nginx does not take this certificate: %s', problem)

def https_text(app, name):
    """Whether a name of an app has https, until when and by whom, or why not."""
    host = app.host
    certificates = host.certificates
    noted = certificates.noted(name)
    for certificate in certificates.of(app.name, [name]):
        x509 = certificates.read(certificate.path)
        if x509 is None or not is_covered_by(name, certificate.names):
            continue

        if not certificates.is_on(app.name):
            return 'http; there is a certificate: sudo dockhand https ' + app.name
        is_used = certificate.path in host.text(proxy_path(app.name))
        if app.live() is not None and not is_used:
            return 'http, though there is a certificate: see dockhand doctor'

        text = 'https, %d days left, by %s' % (certificates.days_left(x509), x509.issuer)
        is_own = certificate.path == certificates.own_path(app.name)
        if not is_own and noted:
            text += '; not renewed: ' + noted['why']
        return text

    if noted:
        return 'no certificate: ' + noted['why']
    if certificates.is_on(app.name):
        return 'no certificate yet: sudo dockhand https ' + app.name
    return 'http: sudo dockhand https ' + app.name

def list_https(host):
    """Each full name of each app, and whether it has https."""
    for name in seen_apps(host):
        app = App(host, name)
        live = app.live()
        names = https_names(app)
        for host_name in names:
            tell('%-16s %-30s %s', name, host_name, https_text(app, host_name))
        if not names and live is not None and live.proxy:
            tell('%-16s %-30s %s', name, '-', no_full_name_text(app, live))

@command('report', 'APP', READ)
def cmd_report(app):
    """print a page with pictures of an app's traffic

    Made by GoAccess of /var/log/nginx/APP.log: ssh git@HOST report shop > shop.html
    """
    return draw_report(app, app.must_be_live())

# Moving

@command('machines', '[add|remove] [NAME] [--json]')
def cmd_machines(host, verb=None, name=None, json=False):
    """list the machines that run apps, add or remove one

    machines add root@ADDRESS: a server with docker, at a fixed private address, that
    root of this one reaches by ssh. An app runs on so many by: config APP machines=3
    """
    known = (None, 'add', 'remove')
    if verb not in known or (verb is None) != (name is None):
        raise Usage('wanted: machines, machines add root@ADDRESS or machines remove NAME')
    if verb == 'add':
        machine = add_machine(host, name)
        tell('%s runs apps from now on: dockhand config APP machines=all', machine.name)
        return spread_anew(host)
    if verb == 'remove':
        remove_machine(host, name, spread_anew)
        return tell('%s is removed', name)

    attempt('machines', catch_up, host)
    found = [describe_machine(host, machine) for machine in host.machines.all()]
    if json:
        return tell_json(found)
    if not found:
        tell('no other machine runs apps: dockhand machines add root@ADDRESS')
    for each in found:
        tell(machine_line(each))

@command('export', '[APP...]')
def cmd_export(host, *names):
    """write apps, or all, as one stream: to move, to back up

    With their data, config, keys and certificates: sudo dockhand export >FILE, or
    ssh OLD sudo dockhand export | ssh NEW sudo dockhand import. An app with volumes is
    stopped while they are copied on the disk here, no longer.
    """
    refuse_if(os.isatty(1), 'a terminal cannot show this: sudo dockhand export >FILE')
    known = all_apps(host)
    for name in names:
        refuse_if(check_app_name(name) not in known, 'no app %s here: see dockhand apps',
                  name)
    export_apps(host, set(names or known))
    log('export of %s by %s', ' '.join(names) or 'all', host.person())

@command('import', '[APP...]')
def cmd_import(host, *names):
    """bring in what `export` wrote, all or some apps

    Nothing is changed before all of it has come and is found whole. Each app is built
    here, and checked; one that does not come up is named, and the others stay.
    """
    refuse_if(os.isatty(0), 'a stream is wanted: sudo dockhand import <FILE')
    host.git_account()
    import_apps(host, names)

@command('destroy', 'APP [--force] [--volumes]', CHANGE)
def cmd_destroy(app, force=False, volumes=False):
    """remove an app, its config and its repository

    --volumes: its data too. Without a terminal it wants --force.
    """
    check_app_name(app.name)
    there = app.name in list_apps(app.host) or os.path.isdir(app.repository())
    refuse_if(not there, 'no app %s here: see dockhand apps', app.name)
    if not force and sys.stdin.isatty():
        tell('This removes %s and its repository for good. Type its name again:',
             app.name)
        force = sys.stdin.readline().strip() == app.name
    refuse_if(not force, 'not removed; if you are sure: dockhand destroy %s --force',
              app.name)

    with app_lock(app, 'dockhand destroy ' + app.name) as live:
        kept = app.docker.volumes_of(app.name)
        remove_app(app, live, kept if volumes else ())
        log('%s: destroy by %s', app.name, app.host.person())
    tell('%s is removed', app.name)
    for name in kept:
        tell('removed volume %s' if volumes else 'kept: docker volume rm %s', name)

# The server itself

def load_certificates(host):
    """Have nginx's files name no certificate that it cannot load."""
    with host_lock(host):
        host.nginx.mend_certificates(host.nginx.problem())

@command('recover', '', ADMIN)
def cmd_recover(host):
    """put right what a crash or a prune left

    It runs at boot, and when docker starts.
    """
    attempt('streams', sweep_streams, host)     # no reason to leave an app down
    host.docker.wait()
    host.docker.free_ports()
    if host.certificates.are_any():     # or nginx would not start, and every site be down
        attempt('certificates', load_certificates, host)
    runs = host.nginx.master() or attempt('nginx', partial(host.nginx.start, wait=False))
    names = set(list_apps(host) + list_folder(host.path(STATE, 'build')))
    wrong = [name for name in sorted(names)
             if not attempt(name, put_right, App(host, name))]

    attempt('machines', catch_up, host)
    attempt('machines', spread_anew, host)
    if host.nginx.master():             # or no authority could ask it for anything
        if host.certificates.are_any():     # a crash may have come before nginx followed
            attempt('nginx', host.nginx.refresh)
        for name in list_apps(host):
            attempt('https for ' + name, get_and_tell, App(host, name))
    refuse_if(wrong, '%d app(s) could not be put right', len(wrong))
    refuse_if(not runs, 'nginx could not be started')

@command('uninstall')
def cmd_uninstall(host):
    """remove dockhand, and nothing that it deployed

    Apps, crontabs and renewals go on without it; `install` finds all again.
    """
    wrong = [name for name in list_apps(host)
             if not attempt(name, put_right, App(host, name))]
    refuse_if(wrong, '%d app(s) could not be put right: nothing is removed', len(wrong))
    remove_installation(host)
    log('uninstall by %s', host.person())
    tell_what_is_left(host)

@command('doctor', '[APP] [--quiet]', READ, alone=ADMIN)
def cmd_doctor(host, name=None, quiet=False):
    """check an app, or the whole installation

    It says what is wrong and what to type; --quiet says nothing where all is well.
    """
    if name is None:
        check_installation(host, quiet)
    else:
        app = App(host, check_app_name(name))
        refuse_if(name not in all_apps(host), 'no app %s here: see dockhand apps', name)
        demand(problems_of(app))
    if not quiet:
        tell('all is well')

def check_installation(host, quiet):
    """Failure where a part of the installation is not as it should be, each is told."""
    demand(requirements(host))
    rows = [
        (not host.account() and 'there is no user ' + host.user, INSTALL_AGAIN),
        (not read_keys(host) and 'no key may push',
         'dockhand upload-key NAME < id_ed25519.pub'),
        (sudo_problem(host), 'visudo'),
        nginx_problem(host),
        (not host.nginx.master() and 'nginx does not run', nginx_advice(host)),
        (not host.nginx.token() and TOKEN_FILE + ' is missing', INSTALL_AGAIN)]
    rows += sshd_problems(host)

    for path, text, mode in installed_parts(host) + installed_hooks(host):
        if host.text(path) != text or mode_of(host.path(path)) != mode:
            rows.append((path + ' is not as installed', INSTALL_AGAIN))
    for name in list_apps(host):
        rows.append(app_problem(App(host, name)))
    demand(rows + https_problems(host) + machine_problems(host))

    if not quiet:
        for place in unread_files(host):
            tell('note: %s: what it names may clash with an app unnoticed', place)

# ---- The command line ------------------------------------------------------------------
# From the words of a process to a function above, and from a Failure to an exit status.

def parse_arguments(pattern, words):
    """(positional words, {option: value}) by the pattern of a Verb; or Usage."""
    from getopt import GetoptError, getopt, gnu_getopt
    known = dict(re.findall(r'\[--?([a-z-]+)( [A-Z]+)?\]', pattern))
    short = ''                          # as getopt wants them: `f`, and `n:` with a value
    longer = []
    for name in known:
        if len(name) == 1:
            short += name + ':' if known[name] else name
        else:
            longer.append(name + '=' if known[name] else name)

    try:
        if 'COMMAND' in pattern:        # whose own options are its own
            options, given = getopt(words, short, longer)
            more, rest = getopt(given[1:], short, longer)
            options += more
            given[1:] = rest
        else:
            options, given = gnu_getopt(words, short, longer)
    except GetoptError as error:
        raise Usage(printable(str(error)))

    least = re.sub(r'\[.*?\]', '', pattern).split()
    most = re.sub(r'\[-.*?\]', '', pattern).split()
    too_many = len(given) > len(most) and '...' not in pattern
    if len(given) < len(least) or too_many:
        raise Usage('wanted: ' + (pattern or 'no words'))

    values = {}
    for option, value in options:
        name = option.lstrip('-')
        values[name.replace('-', '_')] = value if known[name] else True
    return given, values

def run_command(host, words):
    """Run what a person typed after `dockhand`; or Usage."""
    if not words or words[0] in ('help', '-h', '--help'):
        return show_help(host, words[1:])
    if words in (['version'], ['--version']):   # ssh takes the second for its own
        return tell('dockhand %s, Python %d.%d.%d', version_text(), *sys.version_info[:3])

    verb = verb_of(words[0])
    asked = words[1:2] if 'COMMAND' in verb.pattern else words
    if '-h' in asked or '--help' in asked:
        return show_help(host, [verb.name])
    try:
        given, options = parse_arguments(verb.pattern, words[1:])
    except Usage as problem:
        raise Usage(str(problem) + foreign_option(verb.name, words[1:]))
    if host.asker is not None:
        try:
            check_asker(host.asker, verb, given, options)
        except Failure:         # of its words one may be a secret
            log('%s by %s: refused: it has no right to that', verb.name, host.person())
            raise
    refuse_if(os.geteuid() != 0, 'root only: sudo dockhand ' + verb.name)
    if verb.pattern.startswith('APP'):
        app = App(host, check_app_name(given[0]), host.reach())
        return verb.function(app, *given[1:], **options)
    return verb.function(host, *given, **options)

def check_asker(asker, verb, given, options):
    """Failure where a key does not go so far as a command: to its app first, so that of
    others nothing is told."""
    words = re.sub(r'\[-.*?\]', '', verb.pattern).replace('[', '').split()
    if words[:1] in (['APP'], ['APP]']) and given:
        asker.check_reaches(given[0])
    least = re.sub(r'\[.*?\]', '', verb.pattern).split()
    more = set(options) - set(['json', 'quiet'])        # how it is told, not what
    is_alone = len(given) == len(least) and not more
    if not is_alone:
        asker.check_may(verb.right, verb.name)
    elif asker.may(verb.right):         # of an app, that is
        asker.check_may(verb.alone, verb.name + ' without APP')
    else:
        asker.check_may(verb.alone, verb.name)

def typed_by_ssh(text):
    """What is said to somebody who came by ssh: commands that a key may have as they are
    typed there."""
    if 'dockhand' not in text:
        return text
    names = [verb.name for verb in COMMANDS if READ in (verb.right, verb.alone)
             or verb.right == CHANGE]
    return re.sub(r'(?<![\w/.-])(?:sudo )?dockhand (?=(?:%s)\b)' % '|'.join(names),
                  'ssh git@HOST ', text)

def verb_of(name):
    """The Verb of a name; or Usage, with what is meant by the words of other tools."""
    for verb in COMMANDS:
        if verb.name == name:
            return verb
    for pattern, meant in FOREIGN:
        if re.match('(?:%s)\\Z' % pattern, name):
            raise Usage('no command "%s"; here it is: %s', printable(name), meant)
    raise Usage('no command "%s"; `help` lists them', printable(name))

# What people type who come from other tools, and what it is called here
FOREIGN = [
    ('(config|env)s?:(set|add)|setenv|set', 'config APP KEY=VALUE'),
    ('(config|env)s?:(unset|remove|rm)|unsetenv|unset', 'config APP --unset KEY'),
    ('(config|env)s?:(get|show|export|list|ls|vars)|env|vars|configs',
     'config APP --values'),
    ('ps:restart|(apps|app):restart|reload', 'restart APP'),
    ('ps:stop|(apps|app):stop|down|kill|ps:kill', 'stop APP'),
    ('ps:start|(apps|app):start|up', 'start APP'),
    ('ps:rebuild|redeploy|(builds|build):?(create)?', 'rebuild APP'),
    ('ps:scale|scale|ps:set|ps:resize', 'config APP scale="web=2 worker=3"'),
    ('ps|ls|list|apps:list|apps:ls|apps:report', 'apps'),
    ('ps:(inspect|report)|info|apps:info|describe|show|inspect|stats|top', 'status APP'),
    ('(apps|app):(create|new)|create|init|new|deploy|push|launch',
     'git push git@HOST:NAME HEAD:main, which makes the app NAME'),
    ('(apps|app):(destroy|delete|remove)|delete|remove|rm|drop', 'destroy APP'),
    ('domains?(:.*)?|hosts?', 'config APP domains="NAME..."'),
    ('ports?(:.*)?|proxy:ports.*', 'config APP port=N'),
    ('letsencrypt(:.*)?|certs?:auto.*|tls|ssl', 'https APP'),
    ('certs?(:.*)?', 'https APP --cert'),
    ('(docker-)?options(:.*)?|resource.*|limits?(:.*)?',
     'config APP options="--memory 512m"'),
    ('buildpacks?(:.*)?', 'a Dockerfile in the repository'),
    ('cron(:.*)?|scheduler(:.*)?', 'a file `crontab` in the repository'),
    ('releases?:(rollback|revert)|revert|undo', 'rollback APP [N]'),
    ('history|releases?:(list|info)|release', 'releases APP'),
    ('logs?:.*|log|tail|drains?', 'logs APP -f'),
    ('run:.*|exec:new|console', 'run APP [COMMAND...]'),
    ('exec|attach|enter:.*|bash|sh|shell|ssh|ps:exec', 'enter APP [COMMAND...]'),
    ('ssh-keys?(:.*)?|keys:.*|access(:.*)?|users?(:.*)?|members?(:.*)?|collaborators?.*',
     'keys, upload-key NAME [APP...], remove-key NAME'),
    ('dockhand|gitreceive|sudo', 'the same without this word'),
    ('whoami|auth.*|login', 'ssh git@HOST, without a command'),
    ('commands|usage|man', 'help'), ('nginx:.*', 'proxy APP'),
    ('storage(:.*)?|volumes?(:.*)?|mount',
     'VOLUME in the Dockerfile, or config APP options="-v ..."'),
    ('maintenance(:.*)?', 'stop APP, which answers 503 meanwhile')]

# Options that people bring along, and what they are called here
FOREIGN_OPTIONS = {
    'logs': {'--tail': '-f, or -n N', '--follow': '-f', '-t': '-f', '--num': '-n N',
             '--lines': '-n N', '-p': 'logs APP PROCESS', '--ps': 'logs APP PROCESS',
             '--process': 'logs APP PROCESS', '-a': 'logs APP', '--app': 'logs APP'},
    'destroy': {'-f': '--force', '-y': '--force', '--yes': '--force'},
    'run': {'-it': 'ssh -t git@HOST run APP ...', '-t': 'ssh -t git@HOST run APP ...',
            '--rm': 'nothing: it is removed'}}

def foreign_option(name, words):
    """What is said here for an option of another tool, or ''."""
    for word in words:
        meant = FOREIGN_OPTIONS.get(name, {}).get(word.partition('=')[0])
        if meant is not None:
            return '; here it is: ' + meant
    return ''

def show_help(host, names):
    """Print what there is to know of a command, or a line of each that may be used."""
    if len(names) > 1:
        raise Usage('wanted: help [COMMAND]')
    if names:
        return show_verb(verb_of(names[0]))

    tell('dockhand: git push deploys anything that fits in a container\n')
    for verb in COMMANDS:
        if may_use(host.asker, verb):
            tell('  %-33s %s', verb.name + ' ' + plain_pattern(verb), summary_of(verb))
    tell('  %-33s %s', 'help [COMMAND]', 'this list, or all of one')
    tell('  %-33s %s', 'version', 'which dockhand this is')

def may_use(asker, verb):
    """Whether somebody may have a command, be it for an app or be it without one."""
    return asker is None or asker.may(verb.right) or asker.may(verb.alone)

def plain_pattern(verb):
    """What a command is about, without its options."""
    return ' '.join(re.sub(r'\[-.*?\]', '', verb.pattern).split())

def summary_of(verb):
    return verb.function.__doc__.splitlines()[0]

def show_verb(verb):
    """Print how a command is called, what it does, and who may have it."""
    tell('dockhand %s', ' '.join(filter(None, [verb.name, verb.pattern])))
    # Since Python 3.13 the text comes without its margin
    import inspect
    said = inspect.cleandoc(verb.function.__doc__).splitlines()
    if said[1:]:
        said.append('')
    for line in said:
        tell('%s', ('  ' + line).rstrip())
    who = WHO[verb.right]
    if verb.alone != verb.right:
        who += '; without more words ' + WHO[verb.alone]
    tell('  %s', who)

WHO = {ROOT: 'for root on the server', ADMIN: 'for root, and keys with --admin',
       CHANGE: 'for every key but those with --read-only', READ: 'for every key'}

def version_text():
    """Which dockhand this is: there are no numbers, so it is the beginning of what
    `sha256sum dockhand.py` says of the file that runs."""
    import hashlib
    source = read_file(script_path())
    return hashlib.sha256(to_bytes(source)).hexdigest()[:12]

def installed_user(host):
    """The git user of the installation at hand."""
    name = host.text(USER_FILE).strip() or host.text(KEPT_USER).strip()
    if name:
        return name
    # Older versions had it in their launcher alone.
    older = re.search(r"'dockhand', '([a-z0-9._-]+)'\)", host.text(PROGRAM))
    return older.group(1) if older else 'git'

def open_closed_streams():
    """Have the standard streams that are closed lead nowhere: the next file that is
    opened would be taken for one of them."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except EnvironmentError:
            opened = os.open(os.devnull, os.O_RDWR)     # the first number that is free
            fcntl.fcntl(opened, fcntl.F_SETFD, 0)       # for commands too
    if sys.stdin is None:
        sys.stdin = open(os.devnull)

def main(role, user=None):
    """Run as one of dockhand's names; the exit status.
    user: of the launchers of older versions, while they are replaced"""
    on_signals(leave)
    os.umask(0o022)
    open_closed_streams()
    host = Host(user=user or installed_user(Host()))
    words = sys.argv[1:]
    status = 0
    is_served = role != 'receive' and words[:1] == ['serve']

    try:
        if role == 'receive':
            say.reword = tell.reword = typed_by_ssh
            status = receive(host, *words or ['']) or 0
        elif is_served and len(words) > 1:
            status = serve(host, *words[1:])
        else:
            status = run_command(host, words) or 0
    except (Failure, Stopped, EnvironmentError) as problem:
        say('dockhand: %s', problem)
        if is_served or role == 'receive' and host.asker is None:
            log('%s: refused: %s', ' '.join(words), problem)
        status = 2 if isinstance(problem, Usage) else 1

    if role == 'receive' and host.asker is None and say.patience <= 0:
        hang_up(host)
    return status

if __name__ == '__main__':
    sys.exit(main('dockhand'))
