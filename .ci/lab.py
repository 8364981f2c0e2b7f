"""Servers for the tests of the real layer, the apps they push, and what watches these.

Each server is a container that `.ci/server` boots, made ready the way the README says.
All requests go to ports at 127.0.0.1 or are made inside a server. DOCKHAND_TEST_KEEP=NAME
leaves the servers for the next run, which uses them again with the dockhand.py of that
time.
"""
import functools
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zlib
from collections import Counter, namedtuple
from contextlib import closing, contextmanager

import pytest

import dockhand as dh

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REAL_FILES = ('dockhand.py', 'configure-system.sh', 'Vagrantfile', 'test_dockhand.py',
              'README.md')
KINDS = ('systemd', 'none', 'upstart')
KEEP = os.environ.get('DOCKHAND_TEST_KEEP')

Outcome = namedtuple('Outcome', 'status out err')

def run(argv, stdin='', seconds=180, **options):
    """Run a command on this machine, for so long at most; its Outcome."""
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, **options)
    try:
        out, err = process.communicate(
            stdin if isinstance(stdin, bytes) else stdin.encode('utf-8'),
            timeout=seconds)
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

def anywhere(test):
    """Run a test in which no init takes part on one kind of server: each test has its
    own, by its name."""
    kind = KINDS[zlib.crc32(test.__name__.encode()) % len(KINDS)]

    def on_one(servers):
        test(servers[kind])
    on_one.__name__, on_one.__doc__ = test.__name__, test.__doc__
    return on_one

# ---- Servers and apps ------------------------------------------------------------------

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

    def __init__(self, kind, folder, use=''):
        self.kind, self.folder, self.use = kind, folder, use
        self.name = 'dockhand-test-%s-%s%s' % (KEEP or os.getpid(), kind, use)
        self.demo, self.apps, self.port = None, {}, 8100
        self.own_authority = None
        self.config = os.path.join(folder, kind)

    def control(self, *words):
        must(['sh', os.path.join(HERE, '.ci', 'server')] + list(words) + [self.name])

    def control_boot(self):
        words = ['boot', self.kind, self.name]
        if self.use not in ('', '-road'):
            words.append('ready')
        must(['sh', os.path.join(HERE, '.ci', 'server')] + words, seconds=900)

    def prepare(self):
        """Boot it and follow the README, or take what an earlier run left."""
        kept = run(['docker', 'inspect', self.name]).status == 0
        if not kept:
            self.control_boot()
        self.ok('mkdir -p /root/dockhand')
        for name in REAL_FILES:
            if os.path.exists(os.path.join(HERE, name)):
                must(['docker', 'cp', '-L', os.path.join(HERE, name),
                      self.name + ':/root/dockhand/'])
        if kept:
            self.ok('for app in $(ls /var/lib/dockhand/apps); do '
                    'dockhand destroy $app --force --volumes; done; '
                    '/usr/bin/python3 /root/dockhand/dockhand.py install --user git')
        else:
            demo = '' if self.use else ' --demo'
            self.demo = self.ok('sh /root/dockhand/configure-system.sh%s 2>&1' % demo,
                                seconds=600)
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

    # ---- ssh, git, http: one ssh connection a key, since sshd lets few begin at once

    def connect(self):
        self.outside = self.find_ports()
        with open(self.config, 'w') as config:
            config.write(SSH_CONFIG.format(port=self.outside[22], kind=self.kind,
                                           folder=self.folder))
        for alias in ('main', 'other'):
            assert self.dockhand('upload-key', alias,
                                 stdin=public_key(self, alias)).status == 0
            self.open_connection(alias)

    def find_ports(self):
        """{port of the server: where it is on this machine}; another after each boot."""
        return dict(
            (port, int(must(['docker', 'port', self.name, str(port)]).rpartition(':')[2]))
            for port in (22, 80, 2525))

    def open_connection(self, alias):
        with open(os.devnull, 'r+') as null:
            assert subprocess.call(['ssh', '-F', self.config, '-M', '-N', '-f', alias],
                                   stdin=null, stdout=null, stderr=null) == 0

    def disconnect(self, *aliases):
        for alias in aliases:
            run(['ssh', '-F', self.config, '-O', 'exit', alias])

    def ssh(self, *words, **options):
        return run(['ssh', '-F', self.config] + list(words), **options)

    def git(self, *words, **options):
        env = dict(os.environ, GIT_SSH_COMMAND='ssh -F ' + self.config,
                   GIT_CONFIG_NOSYSTEM='1', HOME=self.folder, LC_ALL='C')
        return run(['git', '-c', 'user.name=test', '-c', 'user.email=test@localhost'] +
                   list(words), env=env, **options)

    def hear(self, port, request):
        """What comes back from one of the server's ports, or why nothing does."""
        try:
            connection = socket.create_connection(('127.0.0.1', self.outside[port]), 10)
            try:
                connection.sendall(request.encode())
                parts = iter(lambda: connection.recv(65536), b'')
                return b''.join(parts).decode().strip()
            finally:
                connection.close()
        except (EnvironmentError, socket.error) as error:
            return str(error)

    def get(self, name):
        """What nginx answers to that Host: the body, or the status if not 200."""
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

    def app(self, name, options='--rm --init', stanzas=None, **changes):
        """A web app that has been pushed and answers, made at the first call."""
        if name not in self.apps:
            self.port += 1
            app = App(self, name, self.port)
            files = web_files(name, self.port, options, stanzas=stanzas or STANZAS)
            app.deploy(dict(files, **changes))
            self.apps[name] = app
        self.apps[name].follow()
        return self.apps[name]

    def import_image(self, system, tag):
        """Make an image offline, of a system that .ci/server bootstraps from packages."""
        path = must(['sh', os.path.join(HERE, '.ci', 'server'), system], seconds=900)
        with open(path, 'rb') as source:
            subprocess.check_call(['docker', 'exec', '-i', self.name, 'docker', 'import',
                                   '-', tag], stdin=source, stdout=subprocess.DEVNULL)

    def bases(self):
        """The images that people's Dockerfiles start from, as far as needed here."""
        if self.run('docker', 'inspect', *BASES).status != 0:
            self.import_image('bases', 'bases:1')
            for name in sorted(BASES):
                self.ok('docker build -q -t $1 -', name,
                        stdin='FROM bases:1\n' + BASES[name])

    def authority(self):
        """The certificate authority in this server, made at the first call."""
        self.own_authority = self.own_authority or Authority(self)
        return self.own_authority

    def apache(self):
        """The example of 2014, its base image made offline under the name it names."""
        if 'apache-example' not in self.apps:
            self.import_image('apache', 'ubuntu:12.04')
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
        outcome = self.server.git('push', self.remote, *(words or ('main',)),
                                  cwd=self.folder)
        said = re.findall(r'(?m)^remote: (.*?) *$', outcome.err)
        return outcome._replace(out=[
            line for line in said if not line.startswith('error: hook declined')])

    def hear(self, pattern, options=''):
        """Begin a push until it says this: its process, which leads a group; the text."""
        env = dict(os.environ, LC_ALL='C',
                   GIT_SSH_COMMAND='ssh -F %s %s' % (self.server.config, options))
        process = subprocess.Popen(['git', 'push', self.remote, 'main'], cwd=self.folder,
                                   env=env, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, bufsize=0,
                                   preexec_fn=os.setpgrp)
        heard, deadline = b'', time.time() + 60
        while not re.search(pattern.encode(), heard):
            readable = select.select([process.stdout], [], [],
                                     max(0, deadline - time.time()))[0]
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
        return self.server.ok('docker ps -q --no-trunc --filter ancestor=%s:latest' %
                              self.name)

REAL_WEB = 'FROM tiny:1\nCOPY www /www\n'
STANZAS = 'start on started docker\nstop on stopping docker\nrespawn\n'

def web_files(name, port, options='--rm --init', command='exec httpd -f -h /www',
              stanzas=STANZAS):
    """A web app of a few bytes; its index.html holds its name at first."""
    return {
        'Dockerfile': REAL_WEB + 'CMD ["sh", "-c", "%s"]\n' % command,
        'www/index.html': name + '\n',
        'upstart.conf': stanzas + 'exec docker run %s -p 127.0.0.1:%d:80 %s\n' % (
            options, port, name),
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

# What is in the official images of these names, and Dockerfiles rely on, made of Debian's
# packages. Postgres's entrypoint does what is wanted of theirs here: at its first start it
# makes the database and sets the password.
BASES = {
    'nginx': r'''
RUN rm /etc/nginx/sites-enabled/default && mkdir -p /usr/share/nginx/html && \
    echo 'server { listen 80; root /usr/share/nginx/html; }' >/etc/nginx/conf.d/default.conf && \
    ln -sf /dev/stdout /var/log/nginx/access.log && ln -sf /dev/stderr /var/log/nginx/error.log
EXPOSE 80
STOPSIGNAL SIGQUIT
CMD ["nginx", "-g", "daemon off;"]''',
    'python:3': '''
RUN rm -f /usr/lib/python3*/EXTERNALLY-MANAGED
CMD ["python3"]''',
    'node:16': '''
CMD ["node"]''',
    'postgres': r'''
RUN install -d -o postgres -m 2775 /var/run/postgresql /var/lib/postgresql/data && \
    ln -s /usr/lib/postgresql/*/bin/postgres /usr/lib/postgresql/*/bin/initdb /usr/local/bin
ENV PGDATA=/var/lib/postgresql/data
VOLUME /var/lib/postgresql/data
EXPOSE 5432
STOPSIGNAL SIGINT
ENTRYPOINT ["sh", "-euc", "\
    run() { exec setpriv --reuid postgres --regid postgres --init-groups \"$@\"; }; \
    [ -s $PGDATA/PG_VERSION ] || { chown postgres $PGDATA; \
    echo ${POSTGRES_PASSWORD} >/tmp/password; \
    (run initdb --auth-local trust --auth-host scram-sha-256 --pwfile /tmp/password); \
    echo host all all all scram-sha-256 >>$PGDATA/pg_hba.conf; }; \
    run \"$@\"", "entrypoint"]
CMD ["postgres", "-c", "listen_addresses=*"]'''}

def is_command(name):
    return any(os.access(os.path.join(folder, name), os.X_OK)
               for folder in os.environ['PATH'].split(':'))

def demand_tool(name):
    """Skip a test, or fail it in CI, where a command is missing."""
    if not is_command(name):
        (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)('no ' + name)

def demand_engine():
    """Skip a test, or fail it in CI, where servers cannot be booted."""
    missing = [name for name in ('docker', 'git', 'ssh', 'ssh-keygen')
               if not is_command(name)]
    reason = ('no ' + ', '.join(missing) if missing else 'root only' if os.geteuid()
              else 'no docker engine answers: .ci/server engine'
              if run(['docker', 'ps']).status else '')
    if reason:
        (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)(reason)

@contextmanager
def fresh_servers(use, *kinds):
    """Servers of these kinds inside a `with`, which nothing but their image has been made
    for yet. Each has the keys `main`, `other` and `fresh`."""
    demand_engine()
    folder = tempfile.mkdtemp(prefix='dockhand-')
    made = [Server(kind, folder, use) for kind in kinds]
    try:
        for key in ('main', 'other', 'fresh'):
            must(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f',
                  os.path.join(folder, key)])
        must(['sh', os.path.join(HERE, '.ci', 'server'), 'images'], seconds=900)
        yield made
    finally:
        together(*[server.remove for server in made])
        shutil.rmtree(folder)

@pytest.fixture(scope='session')
def servers(drills):
    """{kind: Server}, made ready at the same time."""
    with fresh_servers('', *KINDS) as made:
        together(*[server.prepare for server in made])
        yield dict((server.kind, server) for server in made)

def public_key(server, key):
    with open(os.path.join(server.folder, key + '.pub')) as file:
        return file.read()

# ---- nginx alone, before an app that keeps what it was told ----------------------------

NGINX_ALONE = '''daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/*.conf;
}}
'''
LARGE = 2 ** 25                 # bytes of an answer: more than sockets on its way hold

class Told(object):
    """An app on a port of its own. heads: what it was told, [str] of each request.

    /            answers `ok`
    /header/N    with a header so long
    /events      one event, and no more until `go_on` is set
    /large       LARGE bytes; then `written` is set
    /teapot      418
    """
    def __init__(self):
        self.heads = []
        self.go_on, self.written = threading.Event(), threading.Event()
        self.listener = socket.socket()
        self.listener.bind(('127.0.0.1', 0))
        self.listener.listen(99)
        self.port = self.listener.getsockname()[1]
        self.begin(self.serve)

    def begin(self, function, *args):
        thread = threading.Thread(target=function, args=args)
        thread.daemon = True
        thread.start()

    def serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except EnvironmentError:
                return
            self.begin(self.answer, connection)

    def answer(self, connection):
        try:
            self.send_answer(connection)
        except EnvironmentError:
            pass                        # it was hung up
        connection.close()

    def send_answer(self, connection):
        head = b''
        while b'\r\n\r\n' not in head:
            part = connection.recv(65536)
            if not part:
                return
            head += part
        length = re.search(br'(?i)\r\ncontent-length: (\d+)', head)
        wanted = head.index(b'\r\n\r\n') + 4 + (int(length.group(1)) if length else 0)
        while len(head) < wanted:           # nginx may pass the body on after the head
            part = connection.recv(65536)
            if not part:
                return
            head += part
        self.heads.append(head.decode('latin-1'))

        path = head.split()[1].decode('latin-1')
        status = b'418 Teapot' if path == '/teapot' else b'200 OK'
        connection.sendall(b'HTTP/1.1 %s\r\nConnection: close\r\n' % status)
        if path.startswith('/header/'):
            connection.sendall(b'X-Long: %s\r\n' % (b'x' * int(path[8:])))
        connection.sendall(b'\r\n')
        self.send_body(connection, path)

    def send_body(self, connection, path):
        if path == '/events':
            connection.sendall(b'data: 1\n\n')
            self.go_on.wait(20)
        elif path == '/large':
            connection.sendall(b'x' * LARGE)
            self.written.set()
        else:
            connection.sendall(b'ok')

class Alone(object):
    """This machine's nginx with these proxy files, {name: text}, inside a `with`: port 80
    of theirs is at `port`, 443 at `tls_port`."""
    def __init__(self, folder, files):
        self.folder, self.files = str(folder), files

    def __enter__(self):
        with closing(socket.socket()) as probe, closing(socket.socket()) as other:
            for each in (probe, other):
                each.bind(('127.0.0.1', 0))
            self.port, self.tls_port = probe.getsockname()[1], other.getsockname()[1]
        for name, text in self.files.items():
            for usual, port in (('80', self.port), ('443', self.tls_port)):
                text = re.sub(r'listen %s\b' % usual, 'listen 127.0.0.1:%d' % port, text)
            self.write(name, text)
        self.write('nginx', NGINX_ALONE.format(folder=self.folder))
        os.rename(self.folder + '/nginx.conf', self.folder + '/nginx')

        self.process = subprocess.Popen(
            ['nginx', '-p', self.folder, '-c', self.folder + '/nginx'],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.said = ''
        assert until(self.is_there, True, 10), self.said
        return self

    def __exit__(self, *raised):
        if self.process.poll() is None:
            self.process.terminate()
        self.process.communicate()

    def write(self, name, text):
        with open('%s/%s.conf' % (self.folder, name), 'w') as target:
            target.write(text)

    def is_there(self):
        if self.process.poll() is not None:
            self.said += self.process.communicate()[0].decode()
            raise AssertionError(self.said)
        try:
            socket.create_connection(('127.0.0.1', self.port), 1).close()
            return True
        except EnvironmentError:
            return False

    def ask_tls(self, name, *lines):
        """What is answered to a request over TLS, for a host that is named or is not."""
        connection = dh.open_connection(('127.0.0.1', self.tls_port), 10, name)
        connection.sendall('\r\n'.join(lines + ('Connection: close', '', '')).encode())
        parts = list(iter(lambda: connection.recv(65536), b''))
        connection.close()
        return b''.join(parts).decode('latin-1')

    def connect(self, *lines, **rest):
        """A connection on which a request was sent, in HTTP/1.1 as these lines.
        rest: its `body`"""
        connection = socket.create_connection(('127.0.0.1', self.port), 10)
        request = '\r\n'.join(lines + ('', rest.get('body', '')))
        connection.sendall(request.encode('latin-1'))
        return connection

    def ask(self, *lines, **rest):
        """What is answered to a request, with `Connection: close`. rest: its `body`"""
        connection = self.connect(*(lines + ('Connection: close',)), **rest)
        parts = list(iter(lambda: connection.recv(65536), b''))
        connection.close()
        return b''.join(parts).decode('latin-1')

@pytest.fixture
def told():
    app = Told()
    yield app
    app.go_on.set()
    app.listener.close()

def demand_nginx():
    """Skip a test, or fail it in CI, where there is no nginx."""
    if not any(os.access(os.path.join(folder, 'nginx'), os.X_OK)
               for folder in os.environ['PATH'].split(':') + ['/usr/sbin']):
        (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)('no nginx')

# ---- Drills, and what they watch -------------------------------------------------------

with warnings.catch_warnings():                 # no file here could make the mark known
    warnings.simplefilter('ignore')
    WHOLE = [pytest.mark.whole, pytest.mark.skipif('not config.option.markexpr',
                                                   reason='long; it runs under -m whole')]
SEED = int(os.environ.get('DOCKHAND_TEST_SEED') or time.time())

def one_in(count, rows):
    """Rows of a table for `parametrize`, each a tuple: CI takes the first of every so many,
    and -m whole the others."""
    return [pytest.param(*row, marks=[] if at % count == 0 else WHOLE)
            for at, row in enumerate(rows)]

def drill(kind, short=0, whole=0):
    """Make a test of a function of (server, size), which returns its figures.
    short: None where CI has one alike, and this runs under -m whole alone"""
    sizes = [pytest.param(short, id='short')] if short is not None else []
    if whole:
        sizes.append(pytest.param(whole, id='whole', marks=WHOLE))

    def as_test(work):
        @pytest.mark.parametrize('size', sizes)
        def on_one(drills, size):
            seconds, figures, error = drills.result(work, size)
            print('%.0f s, seed %d: %s' % (seconds, SEED, figures))
            if error:
                raise error
        on_one.__name__, on_one.__doc__ = work.__name__, work.__doc__
        work.kind, on_one.drill = kind, (kind, work)
        return on_one
    return as_test

class Drills(object):
    """All drills that were asked for, those of a kind of server one after the other on a
    server of their own, beside whatever other tests there are."""

    def __init__(self, items, whole):
        self.queues = {}            # {kind: [(drill, size)]}
        for item in items:
            kind, work = getattr(item.function, 'drill', (None, None))
            if kind and (whole or not item.get_closest_marker('whole')):
                self.queues.setdefault(kind, []).append((work, item.callspec.params['size']))
        self.came_to = {}           # {(drill, size): (seconds, figures, error or None)}
        self.threads = {}

    def begin(self, servers):
        for server in servers:
            self.threads[server.kind] = threading.Thread(target=self.go_through,
                                                         args=(server,))
            self.threads[server.kind].start()

    def go_through(self, server):
        problem = None
        try:
            server.prepare()
        except BaseException as error:
            problem = error
        for work, size in self.queues[server.kind]:
            begun, figures, error = time.time(), None, problem
            try:
                figures = problem or work(server, size)
            except BaseException as caught:
                error = caught
            self.came_to[work, size] = time.time() - begun, figures, error

    def result(self, work, size):
        """What came of a drill, once its turn is over."""
        kind = work.kind
        while (work, size) not in self.came_to and self.threads[kind].is_alive():
            time.sleep(0.1)
        return self.came_to[work, size]

@pytest.fixture(scope='session')
def drills(request):
    found = Drills(request.session.items, request.config.option.markexpr)
    if not found.queues:
        yield found
        return
    try:
        with fresh_servers('-drills', *found.queues) as made:
            found.begin(made)
            yield found
    finally:
        for thread in found.threads.values():
            thread.join()

class Marked(App):
    """A web app whose image, job and proxy file each say of which release they are."""

    # it takes a second to stop, and goes on answering meanwhile
    COMMAND = ("echo $(cat /www/mark) $JOB >/www/index.html; trap 'sleep 1; exit' TERM; "
               "httpd -f -h /www & wait")

    def files(self, mark, slow=''):
        files = web_files(self.name, self.port, '--rm --init -e JOB=' + mark,
                          self.COMMAND)
        proxy = files['nginx-proxy.conf'].replace(
            'location', 'add_header X-Release %s always;\n    location' % mark)
        return dict(files, **{
            'nginx-proxy.conf': proxy, 'www/mark': self.name + ' ' + mark,
            'Dockerfile': files['Dockerfile'].replace('CMD', slow + 'CMD')})

    def release(self, mark):
        """Push a release and see it answer."""
        self.deploy(self.files(mark))
        self.check_whole(mark)

    def mark(self):
        """The release that answers, '' if none does, the answer if it is not whole."""
        answer = self.server.hear(
            80, 'GET / HTTP/1.0\r\nHost: %s.test\r\n\r\n' % self.name)
        head, _, body = answer.partition('\r\n\r\n')
        if not body or re.match(r'HTTP/1.1 50[234] ', head):
            return ''
        mark = (re.findall(r'X-Release: (\w+)', head) or ['none'])[0]
        return mark if body == '%s %s %s' % (self.name, mark, mark) else answer

    def check_whole(self, *marks):
        """One of these releases answers, nothing is left of others; which one."""
        until(lambda: self.mark() in marks, True, 60)
        assert self.mark() in marks
        self.server.ok('nginx -t -q && ! ls /var/lib/dockhand/apps/%s/pending' %
                       self.name)
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
        """What was heard, in words: whole answers of the app that was asked alone."""
        tests = self.server.ok('cat /root/tests').splitlines()
        wrong = [mark for marks in self.heard.values() for mark in marks
                 if not re.match(r'\w*\Z', mark)]
        assert not wrong and set(tests) == set(['valid']), (wrong, set(tests))
        return '; '.join(['%s answered %d times, %d times not' % (
            name, len(marks) - marks.count(''), marks.count(''))
            for name, marks in sorted(self.heard.items())] + [
                'nginx -t passed %d times' % len(tests)])

DATABASE = {'Dockerfile': 'FROM postgres\nCOPY mark /mark\n'
                          'HEALTHCHECK --interval=1s --retries=60 '
                          'CMD pg_isready -U postgres\n'}
WRITER = {'Dockerfile': 'FROM python:3\nCOPY write.py /\nVOLUME /acknowledged\n'
                        'CMD ["python3", "/write.py"]\n', 'write.py': '''
import os, psycopg2, time
acknowledged = os.open('/acknowledged/rows', os.O_WRONLY | os.O_APPEND | os.O_CREAT)
while True:
    try:
        connection = psycopg2.connect(host='data', user='postgres', connect_timeout=2)
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute('CREATE TABLE IF NOT EXISTS rows (row bigint PRIMARY KEY)')
        while True:
            time.sleep(0.01)
            row = time.time_ns()
            cursor.execute('INSERT INTO rows VALUES (%s)', [row])
            os.write(acknowledged, b'%d\\n' % row)
    except psycopg2.Error:
        time.sleep(0.05)
'''}

class Database(App):
    """Real PostgreSQL, and another app that writes to it all the time."""

    def begin(self):
        self.writer = App(self.server, 'writer')
        self.server.ok('dockhand config data POSTGRES_PASSWORD=- && '
                       'dockhand config writer PGPASSWORD=secret', stdin='secret\n')
        self.deploy(dict(DATABASE, mark='0'))
        self.writer.deploy(WRITER)
        self.check(0)

    def acknowledged(self):
        return self.server.ok('docker exec $1 cat /acknowledged/rows',
                              self.writer.container()).split()

    def rows(self):
        query = 'docker exec $1 psql -U postgres -Atc "SELECT row FROM rows"'
        return self.server.ok(query, self.container()).split()

    def check(self, before):
        """Every acknowledged row is there, and 20 more than before; how many."""
        def count():
            found = self.server.run('sh', '-c', 'wc -l </var/lib/docker/volumes/'
                                    'writer--acknowledged/_data/rows').out
            return int(found or 0)
        assert until(lambda: count() >= before + 20, True, 60), count()
        acknowledged = self.acknowledged()
        lost = set(acknowledged) - set(self.rows())
        assert not lost, '%d of %d rows are lost' % (len(lost), len(acknowledged))
        return len(acknowledged)

class Plain(Marked):
    """A plain web app whose image says of which release it is."""

    COMMAND = 'CMD ["httpd", "-f", "-h", "/www"]\n'

    def files(self, mark, command=COMMAND, **more):
        return dict({'Dockerfile': REAL_WEB + 'EXPOSE 80\n' + command,
                     'www/index.html': '%s %s' % (self.name, mark)}, **more)

    def mark(self):
        """The release that answers, '' if none does, the answer if it is another's."""
        answer = self.server.hear(
            80, 'GET / HTTP/1.0\r\nHost: %s.test\r\n\r\n' % self.name)
        body = answer.partition('\r\n\r\n')[2]
        if not body or re.match(r'HTTP/1.1 50[234] ', answer):
            return ''
        mark = re.match(r'%s (\w+)\Z' % self.name, body)
        return mark.group(1) if mark else answer

# Answers at once, to /slow after 5 s, what is uploaded with its length, and to what wants
# another protocol with what it says. It dies at once when it is told to.
ANSWERING = '''
import http.server, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
        if self.headers['Upgrade']:
            return self.echo()
        time.sleep(5 if self.path == '/slow' else 0)
        self.answer(MARK)
    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        self.answer('%d %s' % (len(body), MARK))
    def answer(self, text):
        self.send_response(200)
        self.send_header('Content-Length', str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
    def echo(self):
        self.send_response(101)
        self.send_header('Upgrade', 'websocket')
        self.send_header('Connection', 'Upgrade')
        self.end_headers()
        self.close_connection = True
        for data in iter(lambda: self.rfile.read1(4096), b''):
            self.wfile.write(data)
    def log_message(self, *args):
        pass
MARK = open('/www/index.html').read()
http.server.ThreadingHTTPServer.request_queue_size = 128
http.server.ThreadingHTTPServer(('', 8000), Handler).serve_forever()
'''

class Busy(Plain):
    """One that takes its time to answer."""

    def files(self, mark):
        return dict(Plain.files(self, mark), **{
            'Dockerfile': 'FROM python:3\nCOPY www /www\nCOPY answer.py /\nEXPOSE 8000\n'
                          'CMD ["python3", "/answer.py"]\n', 'answer.py': ANSWERING})

# Hands out messages, one each 20 ms, while /root/queue is there, and prints what became of
# them: {made, done: [how often each was], lives: [(release, type, begun, ended)]}, a life
# being that of a connection. What was handed out and is not done when its connection ends
# is handed out again; once /root/queue is gone no new ones are made.
QUEUE = r'''
import collections, json, os, socketserver, threading, time
waiting, lock = collections.deque(), threading.Lock()
done, lives, current = collections.Counter(), [], set()
made = 0

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        life, message = self.rfile.readline().decode().split() + [time.time()], None
        with lock:
            lives.append(life)
        try:
            for line in self.rfile:
                with lock:
                    if line == b'done\n':
                        done[message] += 1
                    message = waiting.popleft() if waiting else None
                self.wfile.write(b'none\n' if message is None else b'%d\n' % message)
        except OSError:
            pass
        with lock:
            life.append(time.time())
            if message is not None:
                waiting.appendleft(message)

class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True

open('/root/queue', 'w').close()
server = Server(('', 7000), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
print('begun', flush=True)
while os.path.exists('/root/queue'):
    with lock:
        waiting.append(made)
    made += 1
    time.sleep(0.02)
for _ in range(300):
    if len(done) == made:
        break
    time.sleep(0.1)
with lock:
    now = time.time()
    print(json.dumps({'made': made, 'done': [done[at] for at in range(made)],
                      'lives': [(life + [now])[:4] for life in lives]}))
'''

# Takes messages from the queue; once told to end it finishes the one that it has.
TAKING = r'''
import os, signal, socket, sys, time
ending = []
signal.signal(signal.SIGTERM, lambda *_: ending.append(True))
while not ending:
    try:
        queue = socket.create_connection(('host.docker.internal', 7000), 2).makefile('rw')
        print(open('/www/index.html').read().split()[-1], *sys.argv[1:], file=queue)
        word = 'ready'
        while not ending or word == 'done':
            print(word, file=queue, flush=True)
            if ending:
                break
            message = queue.readline()
            time.sleep(0.03)
            word = 'ready' if message == 'none\n' else 'done'
    except OSError:
        time.sleep(0.05)
'''

class Queue(object):
    """The queue inside a `with`, in the server; what became of its messages."""

    def __init__(self, server):
        self.server = server
        self.process = subprocess.Popen(['docker', 'exec', server.name, 'python3', '-c',
                                         QUEUE], stdout=subprocess.PIPE)

    def __enter__(self):
        assert self.process.stdout.readline() == b'begun\n'
        return self

    def __exit__(self, *error):
        self.server.run('rm', '-f', '/root/queue')
        said = self.process.communicate(timeout=120)[0].decode()
        self.result = json.loads(said) if said else None

    def together(self):
        """The lives of two releases' workers at once, in words."""
        found = []
        for at, (mark, kind, begun, ended) in enumerate(self.result['lives']):
            for other, other_kind, began, end in self.result['lives'][:at]:
                if other != mark and min(ended, end) > max(begun, began):
                    found.append('%s of %s, %.1f to %.1f, and %s of %s, %.1f to %.1f' % (
                        kind, mark, begun, ended, other_kind, other, began, end))
        return found

    def check(self, killed=0):
        """Every message was handled once or, of workers that were killed in the midst of
        one, again, and no two releases' workers lived at once; figures."""
        counts = self.result['done']
        assert counts and 0 not in counts, '%d of %d messages are lost' % (
            counts.count(0), len(counts))
        again = sum(counts) - len(counts)
        assert again <= killed, '%d messages were handled again' % again
        assert self.together() == []
        return '%d messages, none lost, %d handled again; %d lives of workers of %d ' \
               'releases, never of two at once' % (
                   len(counts), again, len(self.result['lives']),
                   len(set(life[0] for life in self.result['lives'])))

class Typed(Busy):
    """One with a Procfile: web processes, two types of workers on the queue, and a release
    command that says so."""

    def files(self, mark, **changes):
        files = Busy.files(self, mark)
        return dict(files, **dict({
            'Dockerfile': files['Dockerfile'].replace('CMD', 'COPY take.py /\nCMD'),
            'take.py': TAKING, 'Procfile': (
                'web: python3 /answer.py\nworker: python3 /take.py worker\n'
                'mailer: python3 /take.py mailer\n'
                'release: echo migrates to $(cat /www/index.html)\n')}, **changes))

    def running(self):
        """The type of each of its containers that run."""
        names = self.server.ok("docker ps --format '{{.Names}}'").split()
        found = [re.match(r'%s--\d+(?:--([a-z]+))?(?:--\d+)?\Z' % self.name, name)
                 for name in names]
        return sorted(match.group(1) or 'web' for match in found if match)

    def check_whole(self, *marks):
        """One of these releases answers, with all of its processes and none of others."""
        until(lambda: self.mark() in marks, True, 60)
        assert self.mark() in marks
        self.server.ok('nginx -t -q && ! ls /var/lib/dockhand/apps/%s/pending' %
                       self.name)
        ran = self.server.ok('docker ps --format "{{.Names}}" | grep "^$1--"',
                             self.name).split()
        assert len(set(re.match('.*?--[0-9]+', name).group() for name in ran)) == 1, ran
        assert self.running() == self.WHOLE
        return self.mark()

    WHOLE = ['mailer', 'web', 'worker']

# Runs in a server while /root/load is there; prints {kind: {what came of it: how often}}.
LOADING = r'''
import collections, http.client, json, os, random, select, ssl, sys, threading, time
name, kinds = sys.argv[1], sys.argv[2].split()
came = collections.defaultdict(collections.Counter)
going = lambda: os.path.exists('/root/load')
longest = {}

class Secure(http.client.HTTPConnection):
    """To the app's name over TLS, which the authority's root has to vouch for"""
    trusted = ssl.create_default_context()
    if 'tls' in kinds:
        trusted.load_verify_locations('/root/authority.pem')

    def connect(self):
        http.client.HTTPConnection.connect(self)
        self.sock = self.trusted.wrap_socket(self.sock, server_hostname=name + '.test')

def request(connection, path='/'):
    connection.request('GET', path, headers={'Host': name + '.test'})

def upload(connection):
    connection.putrequest('POST', '/', skip_host=True)
    connection.putheader('Host', name + '.test')
    connection.putheader('Content-Length', '8000')
    connection.endheaders()
    for _ in range(8):
        time.sleep(1)
        connection.send(b'x' * 1000)

def post(connection):
    connection.request('POST', '/cgi-bin/post', 'x', headers={'Host': name + '.test'})

def late(connection):
    connection.connect()
    time.sleep(2)
    request(connection)

def slow(connection):
    request(connection, '/slow')

def outcome(connection):
    """'' for an answer as it should be"""
    answer = connection.getresponse()
    body = answer.read().decode()
    right = answer.status == 200 and body.split()[-2:-1] == [name]
    return '' if right else '%d %s' % (answer.status, body[:80])

def once(kind, act):
    begun = time.time()
    connection = (Secure('127.0.0.1', 443, timeout=60) if kind == 'tls' else
                  http.client.HTTPConnection('127.0.0.1', 80, timeout=60))
    try:
        act(connection)
        came[kind][outcome(connection)] += 1
    except Exception as error:
        came[kind][repr(error)] += 1
    connection.close()
    longest[kind] = max(longest.get(kind, 0), time.time() - begun)

def kept(kind):
    """Requests on one connection, until nginx closes it: a new one if that was seen."""
    connection, sent = http.client.HTTPConnection('127.0.0.1', 80, timeout=60), 0
    while going():
        time.sleep(random.random() / 50)
        if connection.sock and select.select([connection.sock], [], [], 0)[0]:
            connection.close()
        fresh, path = not connection.sock, '/?%d-%d' % (threading.get_ident(), sent)
        sent += 1
        try:
            request(connection, path)
            came[kind][outcome(connection)] += 1
        except Exception as error:
            came[kind]['%s %s %s' % (
                'fresh' if fresh else 'used', path, type(error).__name__)] += 1
            connection.close()

def work(kind):
    act, pause = dict(new=(request, 0.01), tls=(request, 0.01), post=(post, 0.01),
                      slow=(slow, 0), upload=(upload, 0), late=(late, 0),
                      kept=(None, 0))[kind]
    if kind == 'kept':
        return kept(kind)
    while going():
        once(kind, act)
        time.sleep(pause)

open('/root/load', 'w').close()
threads = [threading.Thread(target=work, args=(kind,)) for kind in kinds]
for thread in threads:
    thread.start()
print('begun', flush=True)
for thread in threads:
    thread.join()
print(json.dumps({'came': came, 'longest': longest}))
'''

class Load(object):
    """Requests to an app, made in its server, inside a `with`; what came of them."""

    def __init__(self, app, **threads):
        self.app = app
        kinds = ' '.join(kind for kind in sorted(threads) for _ in range(threads[kind]))
        self.process = subprocess.Popen(
            ['docker', 'exec', app.server.name, 'python3', '-c', LOADING, app.name,
             kinds], stdout=subprocess.PIPE)

    def __enter__(self):
        assert self.process.stdout.readline() == b'begun\n'
        return self

    def __exit__(self, *error):
        self.app.server.run('rm', '-f', '/root/load')
        result = json.loads(self.process.communicate(timeout=120)[0].decode())
        self.came, self.longest = result['came'], result['longest']

    def check(self, dying=False, posts=0):
        """No error, but for those that have their known cause: on kept connections, in
        answers of an app that died in their midst, and so many of what is not asked twice;
        how many requests there were."""
        counts, raced, cut = [], 0, 0
        for kind, outcomes in sorted(self.came.items()):
            counts.append('%d %s' % (sum(outcomes.values()), kind))
            lost = sum(times for error, times in outcomes.items() if error)
            if kind == 'post' and lost:
                assert lost <= posts, outcomes
                counts[-1] += ' (%d lost)' % lost
                continue
            for error, times in outcomes.items():
                broke_off = dying and error.startswith('IncompleteRead')
                raced += kind == 'kept' and bool(error)
                cut += times * broke_off
                assert (not error or broke_off
                        or kind == 'kept' and self.is_race(error)), outcomes
        assert cut <= (dying and self.broken_off())
        return ('requests: %s; the longest new one took %.2f s; kept ones that met the '
                'end of their connection: %d%s') % (
                    ', '.join(counts), max(self.longest.get('new', 0),
                                           self.longest.get('tls', 0)), raced,
                    '; answers that broke off: %d' % cut if dying else '')

    def broken_off(self):
        """The answers that ended with the app that had begun them, as nginx tells."""
        return int(self.app.server.ok(
            'grep -c "while reading upstream,.*host: .%s.test" '
            '/var/log/nginx/error.log || :' % self.app.name))

    def is_race(self, error):
        """Whether nginx closed an idle connection of an old worker as the next request
        was on its way: it was used before, brought no byte, no worker has read the
        request."""
        match = re.match(
            r'used (\S+) (RemoteDisconnected|ConnectionResetError|BrokenPipeError)$',
            error)
        return match and self.app.server.run(
            'sh', '-c', 'cat /var/log/nginx/access.log /var/log/nginx/$2.log | '
            'grep -qF -- "$1 "', 'sh', match.group(1), self.app.name).status == 1

    def requests(self):
        return sum(sum(kind.values()) for kind in self.came.values())

# ---- several machines ------------------------------------------------------------------

class Fleet(object):
    """A front with dockhand, and servers with docker alone, each at a fixed address of a
    network that they share: inside a `with`. What of them is a machine yet is the test's
    to say."""
    SUBNET = '10.213.%d'

    def __init__(self, number, count=2):
        self.subnet = self.SUBNET % number
        self.network = 'dockhand-test-%s-fleet%d' % (KEEP or os.getpid(), number)
        self.uses = ['-front%d' % number] + ['-web%d%d' % (number, at)
                                             for at in range(2, 2 + count)]

    def __enter__(self):
        from contextlib import ExitStack
        self.stack = ExitStack()
        with self.stack:
            must(['docker', 'network', 'create', '--subnet', self.subnet + '.0/24',
                  self.network])
            self.stack.callback(run, ['docker', 'network', 'rm', self.network])
            made = [self.stack.enter_context(fresh_servers(use, 'systemd'))[0]
                    for use in self.uses]
            self.front, self.others = made[0], made[1:]
            together(*[functools.partial(self.boot, server) for server in made])
            for number, server in enumerate(made):
                server.address = '%s.%d' % (self.subnet, 11 + number)
                must(['docker', 'network', 'connect', '--ip', server.address,
                      self.network, server.name])
            self.acquaint()
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *raised):
        self.stack.close()

    def boot(self, server):
        """The front as its README says; another one with the script alone."""
        if server is self.front:
            return server.prepare()
        server.control_boot()
        script = os.path.join(HERE, 'configure-system.sh')
        must(['docker', 'cp', '-L', script, server.name + ':/root/'])
        server.ok('sh /root/configure-system.sh --worker')

    def acquaint(self):
        """Root of the front reaches the others by ssh."""
        key = self.front.ok('ssh-keygen -q -t ed25519 -N "" -f /root/.ssh/id_ed25519 '
                            '</dev/null; cat /root/.ssh/id_ed25519.pub')
        for server in self.others:
            server.ok('mkdir -p -m 700 /root/.ssh; cat >>/root/.ssh/authorized_keys',
                      stdin=key)
            self.front.ok('ssh-keyscan -t ed25519 $1 2>/dev/null >>/root/.ssh/known_hosts',
                          server.address)

    def add(self, server):
        return self.front.ok('dockhand machines add root@$1 2>&1', server.address)

    def machines(self):
        """{name: what `dockhand machines` says of it}."""
        said = self.front.ok('dockhand machines --json')
        return dict((each['name'], each) for each in json.loads(said))

    def answers(self, app, name):
        """What each machine answers by itself for an app, [str] in their order."""
        record = json.loads(self.front.ok(
            'cat /var/lib/dockhand/apps/$1/live/release.json', app))
        ask = 'curl -s -m 5 -H "Host: $1" http://$2:$3/ || echo nothing'
        return [self.front.ok(ask, name, server.address, str(record['published']))
                for server in [self.front] + self.others]

    def power(self, server, word):
        """Cut a machine off its power, `kill`, or have it boot again, `start`."""
        must(['docker', word, server.name])

# ---- https -----------------------------------------------------------------------------

# A certificate authority of one's own, Debian's pebble, and the DNS that it asks; certbot
# trusts it as it trusts any other. Both forget all when they end, the authority its root
# too, and the accounts, which certbot then has to forget.
AUTHORITY = r"""
for package in pebble certbot openssl iptables; do
    dpkg -s $package >/dev/null 2>&1 || missing="$missing $package"
done
[ -z "$missing" ] || {
    apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -y -q install \
        --no-install-recommends $missing
} >/root/authority.apt 2>&1 || { cat /root/authority.apt; exit 1; }

mkdir -p /root/authority && cd /root/authority
[ -e key.pem ] || openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=localhost \
    -addext subjectAltName=DNS:localhost -keyout key.pem -out cert.pem 2>/dev/null
cp cert.pem /usr/local/share/ca-certificates/authority.crt
update-ca-certificates >/dev/null 2>&1
echo '{"pebble": {
    "listenAddress": "127.0.0.1:14000", "managementListenAddress": "127.0.0.1:15000",
    "certificate": "/root/authority/cert.pem", "privateKey": "/root/authority/key.pem",
    "httpPort": 80, "tlsPort": 443, "ocspResponderURL": ""}}' >config.json
grep -q '^server = ' /etc/letsencrypt/cli.ini ||
    echo 'server = https://localhost:14000/dir' >>/etc/letsencrypt/cli.ini

pidof pebble >/dev/null && exit
rm -rf /etc/letsencrypt/accounts
setsid pebble-challtestsrv -defaultIPv4 '' -defaultIPv6 '' -dns01 127.0.0.1:8053 \
    -http01 '' -https01 '' -tlsalpn01 '' -management 127.0.0.1:8055 >dns.log 2>&1 &
PEBBLE_VA_NOSLEEP=1 PEBBLE_WFE_NONCEREJECT=0 PEBBLE_AUTHZREUSE=0 setsid pebble \
    -config config.json -dnsserver 127.0.0.1:8053 >authority.log 2>&1 &
there() { curl -s https://localhost:15000/roots/0 >/root/authority.pem; }
for _ in $(seq 100); do ! there || exit 0; sleep 0.1; done
cat dns.log authority.log
exit 1
"""
AWAY = 'iptables -%s OUTPUT -p tcp --dport 14000 -j REJECT --reject-with tcp-reset'

# status: '200', '000' where there is no answer. version: '1.1' or '2'. location: '' or to
# where. body: what was answered, or why nothing was.
Answer = namedtuple('Answer', 'status version location body')

class Authority(object):
    """In a server, and what is asked of that server over https.

    Names lead to the server's own address: for it itself, by its /etc/hosts, and for the
    authority.
    """

    def __init__(self, server):
        self.server, self.names = server, []
        self.begin()

    def begin(self):
        """Start it where it does not run, with the names that lead to the server."""
        self.server.ok(AUTHORITY)
        self.name(*self.names)

    def address(self):
        return self.server.ok('ip -4 -o addr show eth0').split()[3].partition('/')[0]

    def tell_dns(self, what, **said):
        self.server.ok('curl -sSf -d "$1" http://127.0.0.1:8055/' + what,
                       json.dumps(said))

    def tell_server(self, name, addresses):
        """What addresses a name has in the server's /etc/hosts, which stays this file."""
        lines = ''.join('%s %s\n' % (address, name) for address in addresses)
        self.server.ok(
            'grep -v " $1$" /etc/hosts >/root/hosts || :; cat - >>/root/hosts; '
            'cat /root/hosts >/etc/hosts', name, stdin=lines)

    def name(self, *names):
        """These names lead to the server."""
        self.names = sorted(set(self.names).union(names))
        for name in names:
            self.lead(name, self.address())

    def lead(self, name, *addresses):
        """A name leads to these IPv4 addresses, for the authority and for the server."""
        self.tell_dns('clear-servfail', host=name + '.')
        self.tell_dns('clear-a', host=name + '.')       # it adds to what it has
        self.tell_dns('add-a', host=name + '.', addresses=addresses)
        self.tell_server(name, addresses)

    def fails(self, *names):
        """The authority cannot look these names up any more; the server can."""
        for name in names:
            self.tell_dns('set-servfail', host=name + '.')
            self.tell_server(name, [self.address()])

    def stop(self):
        """Nothing answers at its address."""
        self.server.ok(AWAY % 'I')

    def start(self):
        while self.server.run(*(AWAY % 'D').split()).status == 0:
            pass

    def orders(self, name):
        """How many orders it has taken for a name: each is looked into once."""
        return int(self.server.ok('grep -c "Pulled a task .*\\"$1\\"" '
                                  '/root/authority/authority.log || :', name))

    # ---- asking

    def ask(self, url, *options):
        """The Answer to curl in the server: https has to be the authority's."""
        asked = self.server.run(
            'curl', '-sS', '-m', '20', '--http2', '--cacert', '/root/authority.pem',
            '--connect-to', '::127.0.0.1:', '-w',
            '\n%{http_code} %{http_version} %{redirect_url} .', *options + (url,))
        body, _, line = asked.out.rpartition('\n')
        status, version, location, _ = line.split(' ')
        return Answer(status, version, location, body or asked.err)

    def handshake(self, *options):
        """What openssl says of a handshake on port 443, with these options."""
        asked = self.server.run('openssl', 's_client', '-connect', '127.0.0.1:443',
                                *options)
        return asked.out + '\n' + asked.err

    def serial(self, name):
        """The serial number of the certificate that is served; '' for none."""
        found = re.search('(?s)-----BEGIN .*?-----END [A-Z]+-----',
                          self.handshake('-servername', name))
        if not found:
            return ''
        return self.server.ok('openssl x509 -noout -serial', stdin=found.group())

class Secured(Plain):
    """A plain web app that is asked over https, as NAME.test."""

    def says(self, url, *options):
        """What is answered: `200 a` where its release a does; else the status, and where
        it leads to; `000` where nothing is answered."""
        answer = self.server.authority().ask(url, *options)
        words = [answer.status] + re.findall(r'\A%s (\w+)\Z' % self.name, answer.body)
        return ' '.join(words + answer.location.split())

    def mark(self):
        """The release that answers, '' if none does, the answer if it is another's."""
        said = self.says('https://%s.test/' % self.name)
        if said in ('000', '502', '503', '504'):
            return ''
        return re.sub(r'\A200 (?=\w+\Z)', '', said)

# Whether docker answers. One that is away is not asked: systemd would start it for that.
ALL_THERE = '''
[ "$(cat /proc/$(cat /run/docker.pid)/comm)" = dockerd ] && docker ps -q '''

# Whether containerd does too, nginx is there and dockhand is done
BACK_AGAIN = ALL_THERE + '''&& docker top $(docker ps -q | head -n 1) &&
[ "$(cat /proc/$(cat /run/nginx.pid)/comm)" = nginx ] &&
! pgrep -f '/dockhand recover$' '''

class Crowd(object):
    """Apps, each asked all the time inside a `with`: since when it answers as itself."""

    STEADY, BOUND = 3, 180              # seconds: what it takes is printed, not bounded

    def __init__(self, server, apps):
        self.server, self.since, self.going = server, dict.fromkeys(apps), True
        self.threads = [threading.Thread(target=self.ask, args=(app,)) for app in apps]

    def ask(self, app):
        while self.going:
            if app.mark() != 'a':
                self.since[app] = None
            elif self.since[app] is None:
                self.since[app] = time.time()
            time.sleep(0.2)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self.going = False
        for thread in self.threads:
            thread.join()

    def silent(self):
        return sorted(app.name for app, since in self.since.items() if since is None)

    def doubled(self):
        """Those with two containers that run; a job's has no name of dockhand's."""
        counted = Counter()
        listed = self.server.ok("docker ps --format '{{.Names}} {{.Image}}'")
        for line in listed.splitlines():
            name, image = line.split()
            counted[name.partition('--')[0] if '--' in name
                    else image.partition(':')[0]] += 1
        return sorted(app.name for app in self.since if counted[app.name] > 1)

    def is_back(self):
        """Whether all have answered for a while, with docker and nginx there."""
        since = list(self.since.values())
        if None in since or time.time() - max(since) < self.STEADY:
            return False
        return self.server.run('sh', '-c', BACK_AGAIN).status == 0

    def missing(self, begun):
        """What is not back BOUND seconds after a moment, or doubled; '' if nothing."""
        if until(self.is_back, True, begun + self.BOUND - time.time()):
            doubled = self.doubled()
            return 'two containers of ' + ' '.join(doubled) if doubled else ''
        silent = self.silent()
        if silent:
            return '%d of %d do not answer after %d s: %s' % (
                len(silent), len(self.since), time.time() - begun, ' '.join(silent))
        said = self.server.run('sh', '-xc', BACK_AGAIN).err.splitlines()
        return 'all answer, but after %d s: %s' % (time.time() - begun, said[-1])

    def mend(self):
        """What a person would do, for the next kill to find all well; what is missing."""
        self.server.run('sh', '-c', 'timeout 30 service docker start; '
                        'timeout 30 service nginx start; pkill -P 1 -f "^nginx: worker"')
        said = self.server.run('timeout', '60', 'dockhand', 'recover')
        missing = self.missing(time.time())
        return missing and '; nor is it mended: %s (%s)' % (missing, said.err)

class Worker(Plain):
    """No web app; it ignores SIGTERM, and its command line says its release."""

    # What runs, 20 times a second
    LOOP = (r"touch /root/watch; while [ -e /root/watch ]; do echo $(date +%s.%N) "
            r"$(ps -eo args= | grep -o '[w]orked-[a-z0-9]*' | sort -u); "
            'sleep 0.05; done >/root/ran')
    STOPPING = r'''
stops() { pgrep -f '^docker stop .*worker--'; }
for _ in $(seq 3000); do ! stops || break; sleep 0.01; done
sleep "$1"; stops && kill -9 $(cat /run/docker.pid)'''

    def files(self, mark):
        return {'Dockerfile': 'FROM tiny:1\nCMD ["sh", "-c", "trap \'\' TERM; '
                              'while :; do sleep 1; done", "worked-%s"]\n' % mark}

    def mark(self):
        """The releases of which a worker runs, in words."""
        return ' '.join(sorted(set(re.findall(
            r'worked-(\w+)', self.server.ok('ps -eo args=')))))

    def two_at_once(self, since):
        """The longest time in seconds for which two ran at once, begun after a moment."""
        began, longest = None, 0
        for line in self.server.ok('cat /root/ran').splitlines():
            moment, marks = float(line.split()[0]), line.split()[1:]
            if moment < since or len(marks) < 2:
                began = None
            else:
                began = began or moment
                longest = max(longest, moment - began)
        return longest
