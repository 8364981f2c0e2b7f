"""A machine in a folder: what docker, nginx, git and init do, in small, without them.

Machine is the double that dockhand's Host gets in the tests of its middle layer. After it
come the repositories that these push, and an app that a crash has left half deployed.
"""
import errno
import functools
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import tarfile
import time

import dockhand as dh
from dockhand import Host, Key, Result

SHA, SHA_2, SHA_3, ZERO = '1' * 40, '2' * 40, '3' * 40, '0' * 40

NGINX_CONF = '''user www-data;
pid /run/nginx.pid;
events { worker_connections 768; }
http {
    include /etc/nginx/mime.types;
    %s
    include /etc/nginx/sites-enabled/*;
}
'''

USER, GROUP = os.getuid() or 12345, os.getgid() or 12345

def mode_in(found):
    return '%o' % stat.S_IMODE(found.st_mode)

VOLUMES = '/var/lib/docker/volumes'
QUERIES = ('du', 'docker volume inspect', 'openssl', 'timeout 5 openssl', 'certbot --version', 'docker inspect', 'docker volume ls', 'docker network inspect', 'docker ps', 'docker wait',
           'ip', 'hostname', 'docker version', 'docker logs', 'docker diff', 'nginx -v',
           'docker node ls', 'docker node inspect', 'docker node ps', 'docker service ls',
           'docker service ps', 'initctl version', 'status', 'git', 'which', 'tail', 'ssh-keygen', 'ss -')

SS_HEAD = 'State Recv-Q Send-Q Local Address:Port Peer Address:PortProcess \n'
MAIN = 'refs/heads/main'
PACE = 50                       # how often faster the time of a Machine goes in waiting

class Clock(object):
    """The time on a Machine, where waiting takes less of it."""
    def __init__(self):
        self.ahead = 0

    def sleep(self, seconds):
        time.sleep(seconds / PACE)
        self.ahead += seconds

    def time(self):
        return time.time() + self.ahead

    def monotonic(self):
        return dh.monotonic() + self.ahead

def pem(names, key='k1', issuer='Test CA', begins=1700000000, ends=4000000000):
    """A certificate for these names, and its key, as this machine's openssl reads them."""
    return ('-----BEGIN CERTIFICATE-----\nkey=%s names=%s issuer=%s begins=%d ends=%d\n'
            '-----END CERTIFICATE-----\n' % (key, names.replace(' ', ','),
                                            issuer.replace(' ', '_'), begins, ends)
            + '-----BEGIN PRIVATE KEY-----\nkey=%s\n-----END PRIVATE KEY-----\n' % key)

def is_shown(how, network, route):
    """Whether `ip route show root|match NETWORK` shows a route: of a part, or of more."""
    def bits(text):
        address, _, length = text.replace('default', '0.0.0.0/0').partition('/')
        number = functools.reduce(lambda whole, part: whole * 256 + int(part),
                                  address.split('.'), 0)
        return number, int(length or 32)
    (wanted, longest), (found, length) = bits(network), bits(route)
    shift = 32 - min(longest, length)
    return wanted >> shift == found >> shift and (
        length >= longest if how == 'root' else length <= longest)

class NginxConnection(object):
    """A request to a Machine's nginx: 200, but for the host names in its `answers`, and
    for all of them what the text `deny all` outside of a server makes of them."""
    def __init__(self, machine):
        self.machine, self.status = machine, None

    def settimeout(self, seconds):
        pass

    def sendall(self, data):
        name = re.search(r'Host: (\S+)', dh.to_text(data)).group(1)
        path = dh.to_text(data).split()[1]
        self.body = ''
        is_challenge = path.startswith(dh.CHALLENGE_PATH)
        if is_challenge and self.machine.lets_challenges_through(name):
            self.body = self.machine.read(dh.CHALLENGES + path) or ''
        denied = re.search('(?m)^deny all',
                           str(list((self.machine.served or {}).values())))
        self.status = '403' if denied else self.machine.answers.get(name, '200')

    def recv(self, size):
        answer = 'HTTP/1.1 %s\r\n\r\n' % self.status if self.status.isdigit() else ''
        return dh.to_bytes(answer and answer + self.body)

    def close(self):
        pass

def open_to_all(folder):
    """Let the git user reach a folder: pytest's are root's alone."""
    while os.stat(folder).st_uid == os.getuid() and folder != '/':
        os.chmod(folder, os.stat(folder).st_mode | 0o111)
        folder = os.path.dirname(folder)

class OpenHost(Host):
    """A Host whose git user reaches it, whatever another pytest has made of the folders."""
    def as_git(self, function, *args):
        open_to_all(self.root)
        return Host.as_git(self, function, *args)

class Beside(object):
    """A command of a Machine that was begun: it does all at once, or, where the machine
    `is_late`, when its end is waited for, and nothing if that never is. A `docker wait`
    comes to its end when the container does, or at once where that does not run."""
    def __init__(self, machine, argv):
        self.machine, self.argv, self.said = machine, list(argv), None
        self.waits = self.argv[:2] == ['docker', 'wait']
        if self.waits or not machine.is_late:
            self.said = machine(self.argv)

    def is_over(self):
        if self.waits and not self.said.status:
            found = self.machine.find(self.argv[2])
            return not (found and found['State']['Running'])
        return True

    def result(self):
        self.said = self.said or self.machine(self.argv)
        return self.said

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        pass

class Machine(object):
    """What docker, nginx, git and init do, in small, on files under a root of its own.

    A method is a command: named for its first two words, or the first. A command without
    one fails the test.
    done    the commands that change something, without the root
    broken  {beginning of a command: how often it fails}
    """
    def __init__(self, root, init='none'):
        self.root, self.init = str(root), init
        self.host = OpenHost(self.root, self, clock=Clock(), connect=self.connect)
        self.app = dh.App(self.host, 'blog')
        self.sockets = SS_HEAD
        self.done, self.broken, self.count, self.shares = [], {}, 100, False
        self.images, self.containers, self.jobs = {}, {}, {}
        self.leaving = None         # a container that docker is removing
        self.volumes, self.networks = [], {}
        self.routes = 'default via 192.0.2.9 dev eth0\n'
        self.nodes = {}             # {name: a machine of the swarm}, this one is `front`
        self.services = {}          # {name: what docker's swarm knows of it}
        self.commits, self.refs, self.served, self.state = {}, {}, None, 'running'
        self.history, self.named, self.answers = set(), SHA, {}
        self.here = None            # another address at which its nginx answers
        self.refused = {}           # {host name: what the authority says against it}
        self.ordered = []           # the names that certificates were ordered for
        self.others = 0             # how often another certbot is running
        self.has_certbot = True
        self.absent = []            # other commands that are not here
        self.is_late = False        # what is begun beside something else
        self.is_old = False         # its tar
        self.is_written_to = False  # what that packs
        self.devices = {}           # {volume: options of its driver}
        self.timer = 'active'       # certbot's
        self.caught, self.certified = None, []
        self.wanted = []            # the links among units that systemd has read
        self.write('/etc/passwd', 'git:x:%d:%d::/home/git:/bin/sh\n' % (USER, GROUP))
        self.write('/etc/nginx/nginx.conf', NGINX_CONF % 'include conf.d/*.conf;')
        self.kinds = {}             # of what is pushed and is no commit: {id: kind}
        self.write('/usr/bin/docker-init', '')
        for path in ('/usr/sbin/cron', '/usr/bin/flock', '/usr/bin/logger'):
            self.write(path, '')
        folders = '''/proc /etc/nginx/conf.d /var/log/nginx /home/git /var/lib/dockhand/build /run
            /var/lib/docker /usr/local/bin /etc/sudoers.d /etc/init /etc/cron.d'''.split() + {
                'systemd': ['/run/systemd/system', os.path.dirname(dh.UNIT_ENABLED[0]),
                            os.path.dirname(dh.UNIT_ENABLED[1])],
                'upstart': ['/sbin/initctl'], 'none': []}[init]
        for folder in folders:
            dh.make_folder(self.host.path(folder))
        self.write('/run/crond.pid', '70\n')
        self.process(70, 1, '/usr/sbin/cron')
        self.give('/home/git')

    def write(self, path, text):
        dh.make_folder(os.path.dirname(self.host.path(path)))
        dh.replace_file(self.host.path(path), text)
        self.give(path)

    def give(self, path):
        """Let what lies in the git user's home be that user's."""
        while path.startswith('/home/git'):
            os.chown(self.host.path(path), USER, GROUP)
            path = os.path.dirname(path)

    def read(self, path):
        return dh.read_file(self.host.path(path))

    def __call__(self, argv, account=None, each=None, beside=None, **options):
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
        self.stdin, self.stdout = options.get('stdin'), options.get('stdout')
        if beside:
            beside()
        result = method(*argv[1:])
        return result if isinstance(result, Result) else Result(0, result or '', '')

    def begin(self, argv):
        return Beside(self, argv)

    def signal(self, pid, number):
        """To nginx's master, to take up its configuration."""
        assert (pid, number) == ('50', signal.SIGHUP)
        self(['kill', '-HUP', pid])

    def kill(self, *words):
        self.nginx_s('-s', 'reload')        # where it cannot, it goes on as it was

    def next(self):
        self.count += 1
        return self.count

    def connect(self, place, timeout, tls_name=None):
        """The app of a container that runs listens on its $PORT, or where it has none on
        what its image names, unless it is mute."""
        at, port = place
        is_nginx = at in ('127.0.0.1', self.here) and port == (443 if tls_name else 80)
        if is_nginx and self.read('/run/nginx.pid'):
            return NginxConnection(self)
        if at.startswith('127.'):
            return dh.open_connection(place, timeout)
        if any(task[1:] == (at, port, 'Running') for task in self.tasks()):
            return io.BytesIO()
        for each in self.containers.values():
            if (each['address'], each['State']['Running']) == (at, True):
                image = (self.find(each['Image']) or {}).get('Config') or {}
                exposed = '%d/tcp' % port in image.get('ExposedPorts', {})
                told = re.findall('PORT=([0-9]+)\n', each['env'])
                listens = str(port) in told if told else exposed
                if listens and 'mute' not in each['Image']:
                    return io.BytesIO()
        raise socket.error(errno.ECONNREFUSED, 'Connection refused')

    # docker

    def docker_version(self, _, *words):
        if words:
            return '28.1.0\n'
        return 'Client:\n Version: 29.0.0\nServer:\n Engine:\n  Version: 28.1.0\n'

    def docker_inspect(self, _, *names):
        if names[0].startswith('--type='):
            kind, names = names[0][len('--type='):], names[1:]
            there = {'image': self.images, 'container': self.containers}[kind]
            names = [name if name in there else 'none' for name in names]
        found = [each for each in [self.find(name) for name in names] if each]
        for each in found:
            if 'policy' in each:
                each.setdefault('HostConfig', {})['RestartPolicy'] = {'Name': each['policy']}
        return Result(len(found) < len(names), json.dumps(found), 'No such object\n')

    def find(self, name):
        """An image by tag or id, or a container by name or id."""
        things = list(self.images.items()) + list(self.containers.items())
        found = [thing for key, thing in things
                 if name in (key, thing['Id'], thing.get('Name', '/')[1:])]
        return found[0] if found else None

    def remove(self, container):
        self.containers = dict((key, each) for key, each in self.containers.items()
                               if each is not container)

    def docker_volume(self, _, verb, *words):
        if verb == 'rm':
            self.volumes = [name for name in self.volumes if name not in words]
            for name in words:
                shutil.rmtree(self.host.path(VOLUMES, name), ignore_errors=True)
            return
        if verb == 'create':
            self.volumes.append(words[0])
            return self.fill(words[0], {})
        if verb == 'inspect':
            return json.dumps([{'Driver': 'local', 'Options': self.devices.get(words[0]),
                                'Mountpoint': '%s/%s/_data' % (VOLUMES, words[0])}])
        assert (verb, words) == ('ls', ('-q',))
        return '\n'.join(self.volumes) + '\n'

    def fill(self, volume, files):
        """Let a volume hold these files, {name: text}."""
        dh.make_folder(self.host.path(VOLUMES, volume, '_data'))
        for name, text in files.items():
            self.write('%s/%s/_data/%s' % (VOLUMES, volume, name), text)

    def docker_network(self, _, verb, *words):
        name = words[-1]
        if verb == 'disconnect':
            self.find(name)['also'].remove(dh.OVERLAY)
        elif verb == 'create':
            if name in self.networks:
                return Result(1, '', 'network with name %s already exists\n' % name)
            options = dict(word.partition('=')[::2] for word in words[:-1])
            subnet = options['--subnet'][:-len('.0.0/16')]
            pool = {'Subnet': options['--subnet'], 'Gateway': subnet + '.0.1'}
            if '--ip-range' in options:
                pool['IPRange'] = options['--ip-range']
            self.networks[name] = {'Id': 'n%d' % self.next(), 'Driver': 'bridge',
                                   'Options': options.get('--opt', ''),
                                   'IPAM': {'Config': [pool]}}
        elif verb == 'connect':
            found = self.find(name)
            if dh.OVERLAY in found.setdefault('also', []):
                return Result(1, '', 'endpoint with name x already exists in network y\n')
            found['also'].append(dh.OVERLAY)
        elif name not in self.networks:
            return Result(1, '[]\n', 'Error response from daemon: network x not found\n')
        elif verb == 'rm':
            del self.networks[name]
        else:
            assert verb == 'inspect'
            return json.dumps([self.networks[name]], indent=4)

    def docker_build(self, *words):
        folder, tag = words[-1], words[words.index('-t') + 1]
        named = [word[len('--file='):] for word in words if word.startswith('--file=')]
        text = dh.read_file((named + [os.path.join(folder, 'Dockerfile')])[0])
        name, _, number = tag.partition(':')
        record = '/var/lib/dockhand/apps/%s/releases/%s/release.json' % (name, number)
        assert number == 'plan' or '"seconds": null' in self.read(record)
        self.each('Step 1/1 : ' + text)
        self.images[tag] = image(text)
        if 'fail' in text:
            del self.images[tag]
            return Result(1, '', '')

    # docker's swarm

    def spread(self, *names):
        """Let it be the front of machines of these names."""
        for at, name in enumerate(('front',) + names, 1):
            self.nodes[name] = {'address': '192.0.2.%d' % (10 + at), 'labels': {},
                                'images': {}, 'state': 'ready', 'may': 'active'}
        self.networks[dh.OVERLAY] = {'Id': 'n%d' % self.next(), 'Driver': 'overlay',
                                     'Options': '', 'IPAM': {'Config': [{}]}}
        self.write(dh.MACHINES, '10.87\n')

    def tasks(self):
        """[(service, address, port, state)] of what the swarm has tried to run."""
        found = []
        for name, service in sorted(self.services.items()):
            label, _, image = service['where'].partition('==')
            able = [node for _, node in sorted(self.nodes.items())
                    if node['labels'].get(label) == image and node['state'] == 'ready'
                    and node['may'] != 'drain']
            state = 'Failed' if 'dies' in image else 'Running'
            for node in able[:service['count']]:
                assert node['images'] is self.nodes['front']['images'] or (
                    image in node['images'].values())
                found.append((name, node['address'], service['port'], state))
        return found

    def node_at(self, address):
        return [(name, node) for name, node in self.nodes.items()
                if node['address'] == address][0]

    def docker_node(self, _, verb, *words):
        if verb == 'ls':
            return '\n'.join(sorted(self.nodes))
        if verb == 'inspect':
            return json.dumps([self.described_node(name) for name in words])
        if verb == 'ps':
            address = self.nodes[words[-1]]['address']
            return '\n'.join(task[0] + '.1' for task in self.tasks()
                             if task[1] == address)
        if verb == 'rm':
            del self.nodes[words[-1]]
            return
        assert verb == 'update'
        labels = self.nodes[words[-1]]['labels']
        if words[0] == '--availability':
            self.nodes[words[-1]]['may'] = words[1]
        elif words[0] == '--label-add':
            name, _, value = words[1].partition('=')
            labels[name] = value
        else:
            assert words[0] == '--label-rm'
            del labels[words[1]]

    def described_node(self, name):
        node = self.nodes[name]
        described = {
            'ID': name, 'Spec': {'Labels': node['labels'], 'Availability': node['may']},
            'Description': {'Hostname': name, 'Platform': {'Architecture': 'x86_64'},
                            'Engine': {'EngineVersion': '28.1.0'}},
            'Status': {'State': node['state'], 'Addr': node['address']}}
        if name == 'front':
            described['ManagerStatus'] = {'Addr': node['address'] + ':2377'}
        return described

    def docker_swarm(self, _, verb, *words):
        assert (verb, words) == ('leave', ('--force',))
        self.nodes.clear()
        self.services.clear()

    def docker_service(self, _, verb, *words):
        gone = Result(1, '', 'no such service: x\n')
        if verb == 'create':
            said = dict(word.partition('=')[::2] for word in words if word[:2] == '--')
            if said['--name'] in self.services:
                return Result(1, '', 'rpc error: name conflicts with an existing object\n')
            self.services[said['--name']] = {
                'count': int(said['--replicas']), 'words': list(words), 'ended': [],
                'where': said['--constraint'][len('node.labels.'):],
                'port': int(said['--publish'].rpartition('=')[2])}
        elif verb == 'scale':
            name, _, count = words[1].partition('=')
            if name not in self.services:
                return gone
            self.services[name]['count'] = int(count)
        elif verb == 'ls':
            return ''.join('%s 0/%d\n' % (name, service['count'])
                           for name, service in sorted(self.services.items()))
        elif verb == 'ps':
            if words[-1] not in self.services:
                return gone
            lines = ['%s-%s\t%s\tRunning\t%s 1 second ago\t%s\n' % (
                name, address, self.node_at(address)[0], state,
                'it fell over' if state == 'Failed' else '')
                for name, address, _, state in self.tasks() if name == words[-1]]
            # Of each place some of what ended there stay, over a scale to 0 and back too.
            lines += ['old\t%s\tShutdown\tFailed 3 minutes ago\ttask: non-zero exit (1)\n'
                      % name for name in self.services[words[-1]]['ended']]
            return ''.join(lines)
        elif verb == 'rm':
            return None if self.services.pop(words[0], None) else gone
        else:
            assert verb == 'logs'
            self.each('its last words')

    def docker_save(self, _, option, path, tag):
        """As the real one has it, but that a layer holds its own name."""
        image, files = self.images[tag], {}
        layers = ['%s/layer.tar' % layer for layer in image['RootFS']['Layers']]
        files['manifest.json'] = json.dumps([{'Layers': layers}])
        files['image'] = json.dumps([tag, image['Id']])
        files.update((layer, layer) for layer in layers)
        with tarfile.open(path, 'w') as target:
            for name in sorted(files):
                member = tarfile.TarInfo(name)
                member.size = len(files[name])
                target.addfile(member, io.BytesIO(files[name].encode()))

    def sh(self, _, script, name, *words):
        """A script of dockhand's for a machine, on the front."""
        return self.on_node('front', script, words)

    def ssh(self, *words):
        name, node = self.node_at(words[-2].partition('@')[2])
        if node['state'] != 'ready':
            return Result(255, '', 'ssh: connect to host x port 22: No route to host\n')
        said = shlex.split(words[-1])
        assert said[:2] == ['sh', '-c']
        return self.on_node(name, said[2], said[4:])

    def on_node(self, name, script, words):
        images = self.nodes[name]['images']
        if script == dh.DESCRIBE_IMAGES:
            return json.dumps([{'Id': image, 'RootFS': {'Layers': [image]}}
                               for image in set(images.values())])
        if script == dh.TAKE_IMAGE:
            # Everybody may go through its folder, and what an image holds may be secret.
            assert os.fstat(self.stdin.fileno()).st_mode & 0o777 == 0o600
            with tarfile.open(fileobj=self.stdin) as whole:
                held = whole.extractfile('image').read().decode()
                there = set(image for image in images.values())
                for layer in json.loads(
                        whole.extractfile('manifest.json').read().decode())[0]['Layers']:
                    assert layer in whole.getnames() or layer.split('/')[0] in there
            tag, image = json.loads(held)
            images[tag] = image
            return image
        if script == dh.TAG_IMAGE:
            images[words[0]] = words[1]
            return words[1]
        if script == dh.HAS_IMAGE:
            return Result(words[0] not in images.values(), '', '')
        if script == dh.DROP_IMAGE:
            images.pop(words[0], None)
            return
        if script == dh.LEAVE:
            return
        assert script in (dh.DROP_CONTAINERS, dh.FREE_DISK), script

    def docker_tag(self, _, source, target):
        self.images[target] = self.find(source)

    def docker_rmi(self, *words):
        """By tag, or by id what is called <none>...; it goes on after what is not there."""
        status = 0
        for word in words[1:]:
            gone = [name for name in self.images if word == name or (
                name.startswith('<none>') and word == self.images[name]['Id'])]
            status = status if gone or word.startswith('--') else 1
            for name in gone:
                del self.images[name]
        return Result(status, '', 'Error response from daemon: No such image: x\n')

    def docker_create(self, *words):
        if words[2] in self.containers:
            return Result(1, '', 'Conflict. The name "/x" is already in use by y.\n')
        if words[-1] == 'sha256:' + 64 * '0':
            unknown = [word for word in words if word.startswith('--bogus')]
            return Result(1, '', 'unknown flag: %s\n\nUsage:  docker create x\n\nRun '
                          "'docker create --help' for more information\n" % unknown[0]
                          if unknown else 'Error response from daemon: No such image: x\n')
        at = [at for at, word in enumerate(words) if self.find(word)][0]
        made = self.container('c%d' % self.next(), self.find(words[at])['Id'])
        self.containers[words[2]] = dict(made, Name='/' + words[2],
                                         command=list(words[at + 1:]),
                                         **self.given(words[:at]))

    def container(self, name, image):
        return {'Id': name, 'Image': image, 'RestartCount': 0, 'policy': 'no',
                'NetworkSettings': {}, 'volumes': [], 'address': None, 'env': None,
                'State': {'Running': False, 'StartedAt': '', 'ExitCode': 0}}

    def given(self, words):
        """What the options of `docker create` or `run` say, as docker takes it then."""
        found = [word.partition('=')[::2] for word in words if word[:2] == '--']
        options = dict(found)
        volumes = [value.partition(':')[0] for name, value in found if name == '--volume']
        self.volumes += [name for name in volumes if name not in self.volumes]
        env, network = options.get('--env-file'), self.networks.get(options.get('--net'))
        address = options.get('--ip')
        if address and network and not network['IPAM']['Config'][0]['Subnet'].startswith(
                address.rsplit('.', 2)[0] + '.'):
            raise AssertionError('no configured subnet contains ' + address)
        there = network['Id'] if network else options.get('--net')  # or no start will do
        return {'volumes': volumes, 'network': there, 'address': address,
                'env': env and dh.read_file(env)}

    def docker_run(self, *words):
        if '--detach' in words:
            made = self.docker_create(*words)
            return made or self.docker_start('start', words[2])
        found = [self.find(word) for word in words if self.find(word)]
        self.ran = dict(self.given(words), image=found[0]['Id'])
        self.each('migrated')

    def docker_start(self, _, name):
        if name not in self.containers:
            return Result(1, '', 'Error response from daemon: No such container: x\n')
        if name == self.leaving:
            return Result(1, '', 'Error response from daemon: container is marked for '
                          'removal and cannot be started\n')
        found = self.containers[name]
        if found['State']['Running']:
            return
        others = [each for each in self.containers.values() if each['State']['Running']]
        worker = '/?blog--([0-9]+)--[a-z]'
        if re.match(worker, name):      # no two releases' workers, at any moment
            numbers = re.findall(worker, ' '.join(each['Name'] for each in others))
            assert set(numbers) <= set(re.findall(worker, name))
        if found.get('network') not in [None] + [n['Id'] for n in self.networks.values()]:
            return Result(1, '', 'network %s not found\n' % found['network'])
        assert found['address'] not in [each['address'] for each in others] or (
            not found['address'])
        for each in others:
            assert self.shares or not set(found['volumes']) & set(each['volumes'])
        dies = 'dies' in found['Image'] or 'dies' in found.get('command', ())
        found['State'] = {'Running': not dies, 'ExitCode': 1,
                          'StartedAt': str(self.next())}
        config = (self.find(found['Image']) or {}).get('Config') or {}
        if 'Healthcheck' in config:
            sick = 'un' if 'sick' in found['Image'] else ''
            found['State']['Health'] = {'Status': sick + 'healthy'}

    def of_all(self, names, act):
        """Docker does what it is told to all that are there, and names the others."""
        assert names
        there = [self.find(name) for name in names]
        for found in filter(None, there):
            act(found)
        said = 'Error response from daemon: No such container: x\n' * there.count(None)
        return Result(1 if said else 0, '', said)

    def docker_wait(self, _, name):
        return None if self.find(name) else Result(1, '', 'No such container: x\n')

    def docker_stop(self, _, t, seconds, *names):
        def stop(found):
            found['State'].update(Running=False)
            if found['Id'].startswith('cjob'):      # docker run --rm
                self.remove(found)
        assert t == '-t' and seconds.isdigit()
        return self.of_all(names, stop)

    def docker_update(self, _, option, policy, *names):
        assert option == '--restart'
        return self.of_all(names, lambda found: found.update(policy=policy))

    def docker_rm(self, _, *words):
        names = [word for word in words if word not in ('-f', '-v')]
        assert words[0] == '-f'
        if self.leaving in names:
            self.remove(self.containers[self.leaving])
            self.leaving = None
            return Result(1, '', 'Error response from daemon: removal of container x is '
                          'already in progress\n')
        return self.of_all(names, self.remove)

    def docker_diff(self, _, name):
        return ('A /.dockerenv\nC /sbin\nA /sbin/docker-init\nC /srv\nA /srv/kept.db\n'
                'C /run\nA /run/x.pid\n')

    def docker_ps(self, _, q, no_trunc, network=None, *shown):
        if q == '--filter':
            volume = no_trunc[len('volume='):]
            return '\n'.join(each['Name'][1:] for each in self.containers.values()
                             if volume in each['volumes'] and each['State']['Running'])
        if no_trunc == '--filter':
            name = network[len('network='):]
            there = self.networks[name]['Id']
            return '\n'.join(each['Id'] for each in self.containers.values()
                             if each.get('network') == there or name in each.get('also', []))
        assert q in ('-q', '-aq') and no_trunc == '--no-trunc'
        return '\n'.join(each['Id'] for each in self.containers.values()
                         if q == '-aq' or each['State']['Running'])

    def docker_logs(self, *words):
        self.each('its last words')

    tail = docker_logs

    # init

    def initctl(self, verb):
        return 'init (upstart 1.5)\n'

    def timeout(self, *words):
        if words[0] == '-k':
            words = words[2:]
        try:
            return getattr(self, words[1])(*words[2:])
        except dh.Failure as problem:           # there is no such command
            return Result(127, '', str(problem))

    def ip(self, *words):
        if words[:3] == ('-4', 'route', 'show'):
            return ''.join(line for line in self.routes.splitlines(True)
                           if is_shown(words[3], words[4], line.split()[0]))
        return ''

    def hostname(self, option):
        return '192.0.2.2 172.17.0.1 \n'


    def getent(self, ahosts, name):
        return {'here.org': '192.0.2.2  STREAM here.org\n::5  STREAM\n',
                'www.here.org': '192.0.2.2  STREAM www.here.org\n',
                'api.here.org': '192.0.2.2  STREAM api.here.org\n',
                'there.org': '192.0.2.7  STREAM there.org\n',
                'blog.203-0-113-7.sslip.io': '203.0.113.7  STREAM x\n',
                'blog.2001-db8--1.sslip.io': '2001:db8::1  STREAM x\n'}.get(name, '')

    def start(self, app):
        if app in self.jobs:
            return Result(1, '', 'start: Job is already running: %s\n' % app)
        job = self.read('/etc/init/%s.conf' % app)
        if job is None:
            return Result(1, '', 'start: Unknown job: %s\n' % app)
        assert self.read('/etc/init/%s.override' % app) == 'manual\n'
        image = self.images[app + ':latest']['Id']
        if 'dies' not in image and not self.is_in_the_way(job):
            name = self.jobs[app] = 'job%d' % self.next()
            self.containers[name] = self.container('c' + name, image)
            self.containers[name]['Name'] = '/' + named(job, name)
            self.docker_start('', name)

    def is_in_the_way(self, job):
        """Whether a container that no docker client waits for has what a job wants."""
        left = [each for name, each in self.containers.items()
                if name.startswith('job') and name not in self.jobs.values()]
        return [each for each in left if each['Name'] == '/' + named(job, '') or (
            ' -p ' in job and each['State']['Running'])]

    def stop(self, app):
        """As with Upstart, that of a job whose file is gone fails once it has stopped."""
        assert self.read('/etc/init/%s.override' % app) == 'manual\n'
        known = self.read('/etc/init/%s.conf' % app) is not None
        if app not in self.jobs:
            return Result(1, '', 'stop: Unknown %s\n' % (
                'instance: ' if known else 'job: ' + app))
        if 'deaf' not in self.containers[self.jobs[app]]['Image']:
            del self.containers[self.jobs[app]]
        del self.jobs[app]
        if not known:
            return Result(1, '', 'stop: Method "Get" with signature "ss" on interface '
                                 '"org.freedesktop.DBus.Properties" doesn\'t exist\n')

    def status(self, app):
        if app in self.jobs:
            return '%s start/running, process %s\n' % (app, self.jobs[app][3:])
        if self.read('/etc/init/%s.conf' % app) is None:
            return Result(1, '', 'status: Unknown job: %s\n' % app)
        return app + ' stop/waiting\n'

    def systemctl(self, verb, *words):
        if verb == '--no-block':
            assert words == ('start', 'nginx')
            return self.nginx()
        if verb == 'daemon-reload':
            self.wanted = [link for link in dh.UNIT_ENABLED
                           if os.path.lexists(self.host.path(link))]
            return ''
        if verb == 'is-active':
            return self.timer + '\n'
        assert verb == 'is-system-running'
        return self.state + '\n'

    # certificates

    def certbot(self, verb, *words):
        """As 2.1.0 was seen to do it: its reasons come on standard output, but for those
        that are not the authority's."""
        if not self.has_certbot:
            raise dh.Failure('certbot: No such file or directory')
        if self.others:
            self.others -= 1
            return Result(1, '', 'Another instance of Certbot is already running.\nAsk '
                                 'for help or search for solutions at https://x\n')
        if verb == '--version':
            return 'certbot 2.1.0\n'

        lineage = words[words.index('--cert-name') + 1]
        if verb == 'delete':
            return self.certbot_delete(lineage)
        assert verb == 'certonly' and '-n' in words and '--agree-tos' in words
        assert words[words.index('-w') + 1] == dh.CHALLENGES
        name = words[words.index('-d') + 1]
        assert lineage == 'dockhand-' + name
        self.ordered.append(name)
        if name in self.refused or not self.lets_challenges_through(name):
            return Result(1, 'Requesting a certificate for %s\n\nCertbot failed to '
                          'authenticate some domains (authenticator: webroot). The '
                          'Certificate Authority reported these problems:\n  Domain: %s\n'
                          '  Type:   connection\n  Detail: %s\n\nHint: x\n\n' % (
                              name, name, self.refused.get(name, '404')),
                          'Saving debug log to /x\nSome challenges have failed.\n')
        return self.certbot_keep(lineage, name)

    def certbot_keep(self, lineage, name):
        """What a killed one has left makes it choose another name."""
        conf = '/etc/letsencrypt/renewal/%s.conf'
        if self.read(conf % lineage) == '':
            lineage += '-0001'
        count = len(re.findall(name, ' '.join(self.ordered)))
        text = pem(name, 'k%d' % count)
        chain, begin, key = text.partition('-----BEGIN PRIVATE')
        self.write('/etc/letsencrypt/live/%s/fullchain.pem' % lineage, chain)
        self.write('/etc/letsencrypt/live/%s/privkey.pem' % lineage, begin + key)
        self.write('/etc/letsencrypt/archive/%s/privkey1.pem' % lineage, begin + key)
        self.write(conf % lineage, 'cert = x\n')
        return 'Successfully received certificate.\n'

    def certbot_delete(self, lineage):
        if not self.read('/etc/letsencrypt/renewal/%s.conf' % lineage):
            return Result(1, '', 'No certificate found with name %s\n' % lineage)
        os.unlink(self.host.path('/etc/letsencrypt/renewal/%s.conf' % lineage))
        for folder in ('live', 'archive'):
            shutil.rmtree(self.host.path('/etc/letsencrypt', folder, lineage))

    def lets_challenges_through(self, name):
        """Whether what nginx has taken up answers an authority for a host name."""
        answering = self.caught or ''
        for server, text in [(server, text) for text in (self.served or {}).values()
                             for server in dh.servers_of(text)]:
            if name in server.names:
                return 'acme-challenge' in text
            if any(listen.default for listen in server.listens):
                answering = text
        return 'acme-challenge' in answering

    def openssl(self, verb, *words):
        if verb == 's_client':
            return self.served_pem(words[words.index('-servername') + 1])
        assert words[0] == '-in'
        text = dh.read_file(words[1]) or ''
        kind = 'PRIVATE KEY' if verb == 'pkey' else 'CERTIFICATE'
        told = re.search('-----BEGIN %s-----\nkey=(.*)\n' % kind, text)
        if told is None:
            return Result(1, '', 'unable to load %s\n' % kind.lower())
        key = told.group(1).split()[0]
        if '-pubout' in words or '-pubkey' in words:
            return key + '\n'
        assert verb == 'x509' and words[2:] == ('-noout', '-issuer', '-dates', '-text')
        said = dict(word.split('=') for word in ('key=' + told.group(1)).split())
        moments = [time.strftime('%b %d %H:%M:%S %Y GMT', time.gmtime(int(said[which])))
                   for which in ('begins', 'ends')]
        return ('issuer=C = XX, CN = %s\nnotBefore=%s\nnotAfter=%s\nCertificate:\n    '
                '        X509v3 Subject Alternative Name: \n                %s\n' % (
                    said['issuer'].replace('_', ' '), moments[0], moments[1], ', '.join(
                        'DNS:' + name for name in said['names'].split(',') if name)))

    def served_pem(self, name):
        """The certificate that nginx has taken up for a name."""
        for server, _, text in self.certified:
            if re.search(r'(?m)^ *server_name (.* )?%s[ ;]' % re.escape(name), server):
                return text
        return Result(1, '', 'no peer certificate available\n')

    def secured_servers(self):
        """[(text of a server, path of its certificate, what that holds or None)]"""
        found = []
        for path in dh.list_folder(self.host.path('/etc/nginx/conf.d')):
            for server in (self.read('/etc/nginx/conf.d/' + path) or '').split('\nserver'):
                for pem_path in re.findall(r'ssl_certificate (/\S+);', server):
                    found.append((server, pem_path, self.read(pem_path)))
        return found

    def service(self, name, verb):
        if (name, verb) == ('docker', 'restart'):
            return shutil.rmtree(self.host.path('/proc/60'))
        assert (name, verb) == ('nginx', 'start')
        return self.nginx()

    # nginx

    def nginx(self):
        lost = [path for _, path, _ in self.secured_servers()
                if not self.is_loadable(path)]
        if lost:
            return Result(1, '', 'nginx: [emerg] cannot load certificate "%s"\n' % lost[0])
        self.write('/run/nginx.pid', '50\n')
        self.process(50, 1, 'nginx: master process')
        self.nginx_s('-s', 'reload')

    def process(self, pid, parent, title):
        self.write('/proc/%d/stat' % pid, '%d (ngi) nx) S %d 1' % (pid, parent))
        self.write('/proc/%d/cmdline' % pid, title + '\0')

    def nginx_v(self, _):
        return Result(0, '', 'nginx version: nginx/1.24.0\n')

    def nginx_t(self, t, q, c='-c', path='/etc/nginx/nginx.conf'):
        names = re.findall(r'include (/etc/nginx/\S*[^*\s]);', self.read(path))
        if path == '/etc/nginx/nginx.conf':
            names = ['/etc/nginx/conf.d/' + name for name in dh.list_folder(
                self.host.path('/etc/nginx/conf.d'))]
        known = re.findall('upstream (.*) {',
                           '\n'.join(self.read(name) or '' for name in names))
        for name in [name for name in names if name.endswith('.new')]:
            found, told = self.read(name), []
            told += re.findall('broken', found)
            told += ['upstream ' + each for each in known if known.count(each) > 1]
            told += ['proxy_pass http://' + each for each in re.findall(
                r'proxy_pass http://([a-z]+);', found) if each not in known]
            for each in [each for each in told if each in found]:
                line = found[:found.index(each)].count('\n') + 1
                return Result(1, '', 'nginx: [emerg] %s in %s:%d\n' % (each, name, line))
        for name in names:
            if 'HTTPS BREAKS' in (self.read(name) or '') and 'listen 443' in self.read(name):
                return Result(1, '', 'nginx: [emerg] "x" directive is duplicate in %s:4\n'
                              % name)
            for pem_path in re.findall('ssl_certificate (/.*);', self.read(name) or ''):
                if not self.is_loadable(pem_path):
                    return Result(1, '', 'nginx: [emerg] cannot load certificate "%s": '
                                         'BIO_new_file() failed\n' % pem_path)

        self.make_logs(names)

    def make_logs(self, names):
        """The logs that these files name: nginx opens them to test its configuration."""
        for name in names:
            for path in re.findall('(?:access|error)_log (/[^ ;]*)', self.read(name) or ''):
                if self.read(path) is None:
                    self.write(path, '')

    def is_loadable(self, pem_path):
        text = self.read(pem_path) or ''
        return dh.is_whole_pem(text) and 'BROKEN' not in text

    def nginx_s(self, s, reload):
        for _, path, text in self.secured_servers():
            if not self.is_loadable(path):
                return Result(1, '', 'nginx: [emerg] cannot load certificate "%s": x\n'
                              % path)
        for pid in os.listdir(self.host.path('/proc')):
            if pid not in ('50', '70'):
                shutil.rmtree(self.host.path('/proc', pid))
        self.process(self.next(), 50, 'nginx: worker process')
        self.process(51, 50, 'nginx: worker process is shutting down')
        self.process(52, 1, 'nginx: worker process')
        self.served = dict((path, self.read(path)) for path in self.host.nginx.files())
        self.make_logs(self.served)
        self.caught = self.read(dh.CATCH_ALL)
        self.certified = self.secured_servers()

    # git and files

    def git(self, folder, verb, *words):
        if folder == '-c':
            return self.git_init(words[-1])
        assert re.match(re.escape('--git-dir=' + self.host.path('/home/git/')) +
                        r'[a-z]+\.git\Z', folder)
        if verb == 'ls-tree':
            for name, text in sorted(self.commits[words[-1]].items()):
                self.each('100644 blob %s %7d\t%s' % (SHA, len(text), name))
        if verb == 'read-tree':
            self.index = self.commits[words[0]]
        if verb.startswith('--work-tree='):
            assert words == ('checkout-index', '-a')
            self.check_out(verb.partition('=')[2])
        if verb == 'for-each-ref' and words[0] == '--count=1':
            return ''.join(sorted(self.refs)[:1])
        if verb == 'bundle':
            return self.bundle(*words)
        if verb == 'fetch':
            return self.fetch(*words)
        if verb == 'for-each-ref':
            return self.refs.get(words[-1], '') + '\n'
        if verb == 'symbolic-ref':
            self.head = words[-1]
            return 'refs/heads/master\n'
        if verb == 'cat-file':
            return self.cat_file(*words)
        if verb == 'rev-parse' and ':' in words[0]:
            commit, _, path = words[0].partition(':')
            below = [item for item in sorted(self.commits[commit].items())
                     if item[0].startswith(path + '/')]
            return hashlib.sha1(dh.to_bytes(json.dumps(below))).hexdigest() + '\n'
        if verb == 'rev-parse':
            return self.named + '\n'
        if verb == 'merge-base':
            return words[0] + '\n' if words in self.history else Result(1, '', '')
        if verb == 'rev-list':
            return 'commit\n' if words[-1] in self.commits else Result(128, '', 'fatal\n')
        if verb == 'update-ref' and words[0] == '-d':
            self.refs.pop(words[1], None)
        elif verb == 'update-ref':
            self.refs[words[0]] = words[1]

    def git_init(self, folder):
        os.makedirs(folder)
        with open(folder + '/HEAD', 'w') as target:
            target.write('ref: refs/heads/main\n')

    def bundle(self, verb, dash, *refs):
        """What a bundle holds is all that is here."""
        assert (verb, dash) == ('create', '-') and self.refs
        wanted = refs[2:] + ('refs/heads/', 'refs/tags/')
        held = {'refs': dict((ref, self.refs[ref]) for ref in self.refs
                             if ref.startswith(wanted)), 'commits': self.commits}
        self.stdout.write(dh.to_bytes(json.dumps(held)))

    def fetch(self, q, path, *specs):
        held = dh.native(json.loads(dh.read_file(path)))
        for spec in specs:
            source, target = [each.rstrip('*') for each in spec.lstrip('+').split(':')]
            found = [ref for ref in held['refs'] if ref.startswith(source)]
            assert found or spec.endswith('*'), spec
            self.refs.update((target + ref[len(source):], held['refs'][ref])
                             for ref in found)
        self.commits.update(held['commits'])

    def cat_file(self, how, name):
        if how == 'tag':
            for line in ('object ' + SHA, 'type commit', 'tag v1.0', '', 'tag me'):
                self.each(line)
            return
        if how == '-e':
            commit, _, path = name.partition(':')
            return Result(0 if path in self.commits[commit] else 128, '', '')
        assert how == '-t'
        if name not in self.commits:
            return Result(128, '', 'fatal: Not a valid object name %s\n' % name)
        return self.kinds.get(name, 'commit') + '\n'

    def mkdir(self, folder):
        os.mkdir(folder)

    def check_out(self, folder):
        for name, text in self.index.items():
            path = os.path.join(folder, name)
            if not os.path.isdir(os.path.dirname(path)):
                os.makedirs(os.path.dirname(path))
            with open(path, 'wb') as target:
                target.write(dh.to_bytes(text))

    def du(self, *words):
        return subprocess.check_output(('du',) + words).decode()

    def tar(self, *words):
        """The real one; one before 1.27 knows no --xattrs."""
        if '--version' in words:
            return Result(64 if self.is_old else 0, '', '')
        assert not (self.is_old and '--xattrs' in words)
        status = subprocess.call(('tar',) + words, stdin=self.stdin)
        if status == 0 and self.is_written_to:
            return Result(1, '', 'tar: ./kept: file changed as we read it\n')
        return Result(status, '', '')

    def update_rc_d(self, *words):
        """Puts links where init finds them, or takes them away."""
        folder = '/etc/rc2.d'
        if words == ('dockhand-recover', 'defaults'):
            dh.make_folder(self.host.path(folder))
            dh.replace_link(self.host.path(folder, 'S01dockhand-recover'), 'x')
        else:
            assert words == ('-f', 'dockhand-recover', 'remove')
            os.unlink(self.host.path(folder, 'S01dockhand-recover'))

    def rm(self, *words):
        assert words[:2] == ('-rf', '--') and words[2:]
        for path in words[2:]:
            assert path.startswith(self.root + '/')
            if path.endswith('/blog.git'):
                self.refs = {}
            shutil.rmtree(path, ignore_errors=True)
            if os.path.islink(path) or os.path.isfile(path):
                os.unlink(path)

    def ss(self, options):
        assert options == '-tanp'
        return self.sockets

    # installing

    def which(self, name):
        if name == 'certbot' and not self.has_certbot or name in self.absent:
            return Result(1, '', '')
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

    dpkg_query = visudo

    def ssh_keygen(self, l, f, path):
        return '256 SHA256:%s no comment (ED25519)\n' % dh.read_file(path).split()[1][-8:]

    # what the tests look at

    def files(self, *besides):
        """{path: (text or target, mode, owner)} of all files but processes and locks."""
        found = {}
        for folder, folders, names in os.walk(self.root):
            for path in [os.path.join(folder, name) for name in folders + names]:
                short = path[len(self.root):]
                if not short.startswith(('/proc', '/run/lock') + besides):
                    about = os.lstat(path)
                    found[short] = (content(path, about.st_mode), mode_in(about),
                                    (about.st_uid, about.st_gid))
        return found

    def running(self):
        there = [each['Image'] for each in self.containers.values()
                 if each['State']['Running']]
        there += [service['where'].partition('==')[2]
                  for service in self.services.values() if service['count']]
        return sorted(there)

    def whole(self):
        """All that must be as before when a deploy of release 2 fails."""
        found = self.files('/var/lib/dockhand/apps/blog/releases/2')
        found.update((tag, image['Id']) for tag, image in self.images.items())
        found.update((name, (each['policy'], each['address'], each['env']))
                     for name, each in self.containers.items()
                     if not name.startswith('job'))
        return dict(found, refs=self.refs.copy(), running=self.running(),
                    jobs=sorted(self.jobs), served=self.served)

    def changed(self, before):
        now = self.whole()
        return sorted(key for key in set(before) | set(now)
                      if before.get(key, 0) != now.get(key, 0))

    def release(self, number, commit, files, seconds=None, **config):
        """A Release of these files, built, as a deploy makes it before the switch."""
        tag, self.commits[commit] = 'blog:%d' % number, files
        self.images[tag] = image(files['Dockerfile'])
        self.refs['refs/dockhand/%d' % number] = commit
        job, proxy = files.get('upstart.conf'), files.get('nginx-proxy.conf')
        made = release(
            number=number, commit=commit, seconds=seconds, image=self.images[tag]['Id'],
            config=config, job=JOB_HEADER + job if job else '',
            proxy=PROXY_HEADER + proxy if proxy else '',
            procfile=files.get('Procfile'), crontab=files.get('crontab', ''),
            **OF_A_JOB)
        self.app.save(made)
        if not job:
            settings = self.images[tag]['Config']
            made = dh.take_places(self.app, made)
            made = dh.complete_plain(self.app, self.app.live(), made, settings)
            self.app.save(made)
        return made

    def lives(self, files, **config):
        """Release 1, as a deploy would have left it."""
        if self.read('/home/git/' + dh.KEYS) is None:
            self.write('/home/git/' + dh.KEYS, keys_text(
                Key('ssh-ed25519', 'AAAA', 'anna', ())))
        live = self.release(1, SHA, files, 2.5, **config)
        self.app.save_config(config)
        engine = dh.engine_of(self.app, live)
        self.images['blog:latest'] = self.images['blog:1']
        self.refs['refs/heads/main'] = SHA
        self.app.set_link('live', live)
        for act in (engine.prepare, engine.place, engine.start, engine.settle):
            act(live)
        dh.write_cron_script(self.app, live)
        dh.place_crontab(self.app, live)
        self.nginx()
        self.host.nginx.restore('blog', live.proxy)
        del self.done[:]
        return live

    def push(self, files, ref=MAIN, old=SHA, new=SHA_2):
        self.commits[new] = files
        dh.receive(self.host, 'update', 'blog', 'anna', ref, old, new)
        self.refs[ref] = new

def keys_text(*keys):
    """An authorized_keys file of these Keys."""
    lines = dh.insert_keys([], [dh.make_key_line(key) for key in keys])
    return dh.render_authorized_keys(lines)

def named(job, otherwise):
    """The name that a job gives its container."""
    return (re.findall(r'--name[ =](\S+)', job) or [otherwise])[0]

def image(dockerfile):
    """What docker says of an image, which is named for the first line."""
    ports = [port + ('' if '/' in port else '/tcp')
             for port in re.findall(r'(?m)^EXPOSE (\S+)', dockerfile)]
    paths = re.findall(r'(?m)VOLUME ?(\S*)', dockerfile)
    config = {'Volumes': dict((path or '/data', {}) for path in paths) or None,
              'ExposedPorts': dict((port, {}) for port in ports)}
    if 'HEALTHCHECK' in dockerfile:
        config['Healthcheck'] = {'Test': ['CMD', 'true']}
    return {'Id': 'sha256:' + re.sub(r'\W', '', dockerfile.partition('\n')[0]),
            'Size': 5000000, 'Config': config,
            'RootFS': {'Layers': [re.sub(r'\W', '', dockerfile)]}}

def content(path, mode):
    if stat.S_ISLNK(mode):
        return os.readlink(path)
    if stat.S_ISREG(mode):
        with open(path, 'rb') as source:
            return source.read()

# ---- What is pushed to it --------------------------------------------------------------

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

def switch_steps(host, old, new, run=True):
    """The stop-then-start of a switch, step by step, as dockhand's own does it."""
    app = dh.App(host, 'blog')
    engine, steps = dh.engine_of(app, new), []
    if old:
        before = dh.engine_of(app, old)
        steps.append(lambda: before.stop(old))
        if type(before) != type(engine):
            steps.append(lambda: before.withdraw(old))
    steps += [lambda: host.docker.tag(dh.image_tag(new), new.app + ':latest'),
              lambda: engine.place(new), lambda: host.nginx.install(new, False, None)]
    return steps + ([lambda: engine.start(new)] if run else [])

# What a release with a job has not, and a plain one only once its image is known.
OF_A_JOB = {'port': 0, 'web': False, 'volumes': [], 'addresses': [], 'machines': [],
            'published': 0}

def release(**changes):
    """The dh.Release of a plain web app, changed by keywords."""
    fields = dict(app='blog', number=3, plan=False, commit=SHA, branch='main', by='anna',
                  how='push', layers=[], time=1, seconds=None, failed=None, image='sha256:x', config={},
                  port=8000, web=True, volumes=[], addresses=['10.86.0.2'], job='', proxy='',
                  crontab='')
    return dh.Release(**dict(fields, **changes))

def half_deployed(machine, steps=99, files=None, **config):
    """A crash after so many steps of a switch to release 2."""
    one, two = files or (FILES, FILES_2)
    live = machine.lives(one, **config)
    new = machine.release(2, SHA_2, two, **config)
    machine.app.set_link('pending', new)
    acts = [lambda: dh.engine_of(machine.app, new).prepare(new)]
    acts += switch_steps(machine.host, live, new)
    acts += [lambda: dh.write_cron_script(machine.app, new),
             lambda: dh.place_crontab(machine.app, new)]
    for act in acts[:steps]:
        act()
    return new

def an_app(name, more='EXPOSE 8000', proxy=None):
    """The files of a plain app. more: lines of its Dockerfile"""
    files = {'Dockerfile': 'FROM %s\n%s\n' % (name, more)}
    return dict(files, **{'nginx-proxy.conf': proxy} if proxy else {})

ONE_WEB, TWO_WEB = an_app('one'), an_app('two')
ONE_TYPES, TWO_TYPES = [
    dict(an_app(name, 'EXPOSE 8000'), Procfile='worker: work %s\nweb: serve\n' % name)
    for name in ('one', 'two')]
NAMED = ('server {\n    listen 80;\n    server_name here.org www.here.org;\n'
         '    location / { proxy_pass http://blog; }\n}\n')
ONE_NAMED, TWO_NAMED = [an_app(name, proxy=NAMED) for name in ('one', 'two')]
ONE_DATA, TWO_DATA = [an_app(name, 'EXPOSE 8000\nVOLUME /data\nHEALTHCHECK x')
                      for name in ('one', 'two')]
ONE_CRON, TWO_CRON = [dict(an_app(name), crontab='* * * * * bin/both\n@daily bin/%s\n' % name)
                      for name in ('one', 'two')]
