#!/bin/sh
# configure-system.sh: makes an Ubuntu or Debian server ready for dockhand.
#
#   scp configure-system.sh dockhand.py root@HOST:
#   ssh root@HOST sh configure-system.sh [--user NAME] [--local-name] [--demo]
#   ssh root@HOST sh configure-system.sh --worker
#
# It installs what is missing (docker's engine, nginx, git, an ssh server, sudo, certbot, cron,
# goaccess, a static busybox, a Python), starts it by whatever init is there, and runs
# `dockhand.py install` from beside it.
# --local-name makes this host known as NAME.local to its neighbours, by avahi, which opens udp
# ports. --demo then pushes a small app to this very host and removes it again.
# --worker makes it a machine for `dockhand machines add`: docker's engine and an ssh server, no more.
# It asks nothing, says only what it changes, and a second run changes nothing. For Ubuntu 12.04 and
# 14.04 (Upstart), 16.04 to 26.04, Debian 10 and later, and machines whose PID 1 is no init.
set -eu

export LC_ALL=C DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=a
PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
unset DOCKER_HOST DOCKER_CONTEXT UPSTART_SESSION    # this host's docker and init, nobody else's
umask 022

ME=configure-system.sh
HERE=$(cd "$(dirname "$0")" && pwd)
GIT_USER='' LOCAL_NAME='' DEMO='' WORKER=''     # --user, --local-name, --demo, --worker
WORK=''                       # temporary folder, made when needed
CHANGED=''                    # set by the first thing that changes
MADE_APP='' MADE_KEY=''       # what the demonstration has to take away

# ---- small tools ----------------------------------------------------------------------------

say() { printf '%s\n' "-----> $*"; }
note() { printf '%s\n' "       $*"; }
changed() { CHANGED=yes; say "$@"; }
die() { printf '%s\n' "$ME: $*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# within SECONDS COMMAND...: tries until the command succeeds, for so long at most
within() {
    deadline=$(($(date +%s) + $1))
    shift
    until "$@"; do
        [ "$(date +%s)" -lt "$deadline" ] || return 1
        sleep 0.2
    done
}

# at_least 3.13 3.8: the first version is the second or later
at_least() { [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]; }

# alive COMMAND PIDFILE: processes of containers show up too, so a name alone says nothing
alive() { [ -s "$2" ] && [ "$(cat "/proc/$(cat "$2")/comm" 2>/dev/null)" = "$1" ]; }

work_folder() { [ -n "$WORK" ] || WORK=$(mktemp -d); }

clean_up() {
    trap '' INT TERM HUP
    cd /
    [ -z "$MADE_APP$MADE_KEY" ] || say "taking away what the demonstration made"
    [ -z "$MADE_APP" ] || ! dockhand apps | grep -q "^$MADE_APP " ||
        show "dockhand destroy $MADE_APP --force" || :
    [ -z "$MADE_KEY" ] || show "dockhand remove-key $MADE_KEY" || :
    [ -z "$WORK" ] || rm -rf "$WORK"
}

# ---- options, and what is here --------------------------------------------------------------

# usage STATUS
usage() {
    echo "usage: sh $ME [--user NAME (whom pushes go to, git otherwise)]"
    echo "       [--local-name (answer to $(uname -n).local, by avahi)] [--demo]"
    echo "or:    sh $ME --worker (docker alone, for dockhand machines add)"
    exit "$1"
}

parse_options() {
    case "$*" in --worker) WORKER=yes; return ;; esac
    while [ $# -gt 0 ]; do
        case $1 in
        --demo) DEMO=yes ;;
        --local-name) LOCAL_NAME=yes ;;
        --user) shift; GIT_USER=${1:-}; case $GIT_USER in '' | -*) usage 2 >&2 ;; esac ;;
        -h | --help) usage 0 ;;
        *) usage 2 >&2 ;;
        esac
        shift
    done
}

os() { sed -n "s/^$1=//p" /etc/os-release 2>/dev/null | tr -d '"'; }

look_around() {
    have apt-get || die "no apt-get here: this needs Ubuntu 12.04 or later, or Debian 10 or later"
    RELEASE="$(os ID) $(os VERSION_ID)"
    KERNEL=$(uname -r | sed 's/^\([0-9]*\.[0-9]*\).*/\1/')
    if [ -d /run/systemd/system ]; then INIT=systemd
    elif initctl version 2>/dev/null | grep -q upstart; then INIT=upstart
    else INIT=none; fi
}

kernel_package() {
    case $RELEASE in
    debian*) echo "linux-image-$(dpkg --print-architecture)" ;;
    'ubuntu 12.04') echo linux-image-generic-lts-trusty ;;
    *) echo linux-image-generic ;;
    esac
}

say_where_packages_moved() {
    note "Old releases move to an archive (Ubuntu 12.04 and Debian 10 have). To have apt-get look there:"
    case $RELEASE in
    debian*) note "  sed -i -r 's/(deb|security)\\.debian\\.org/archive.debian.org/' /etc/apt/sources.list" ;;
    *) note "  sed -i -r 's/([a-z.]*archive|security)\\.ubuntu/old-releases.ubuntu/' /etc/apt/sources.list" ;;
    esac
}

# ---- what it cannot do without --------------------------------------------------------------

require_root() { [ "$(id -u)" -eq 0 ] || die "run this as root: sudo sh $0"; }

require_dockhand() {
    [ -z "$WORKER" ] || return 0
    [ -f "$HERE/dockhand.py" ] ||
        die "dockhand.py is not beside it: scp dockhand.py root@$(uname -n):$HERE/ and run this again"
}

# require_kernel VERSION WHAT
require_kernel() {
    at_least "$KERNEL" "$1" || {
        say_where_packages_moved >&2
        die "$2 needs Linux $1 or later, this is $(uname -r): apt-get install $(kernel_package), reboot, run this again"
    }
}

# What is called docker, and is no engine that root's docker command reaches
refuse_other_dockers() {
    [ ! -e /snap/bin/docker ] ||
        die "docker is a snap, which sees neither /var/lib nor /tmp: snap remove docker; apt-get install docker.io"
    path=$(command -v docker) || return 0
    if dpkg -S "$path" 2>/dev/null | grep -q '^docker: '; then
        die "$path is a dock applet, not docker: apt-get remove docker; apt-get install docker.io"
    fi
    case $(docker --version 2>&1 || :) in
    *[Pp]odman*) die "$path is podman's shim: apt-get remove podman-docker; apt-get install docker.io" ;;
    *'Docker version'*) ;;
    *) die "$path is not docker: remove it; apt-get install docker.io" ;;
    esac
}

# ---- packages -------------------------------------------------------------------------------

# apt_tried ARGUMENTS...: false while another apt holds the lock; APT_STATUS says how it ended
apt_tried() {
    APT_STATUS=0
    apt-get -y -q -o DPkg::Lock::Timeout=60 -o Dpkg::Options::=--force-confdef \
        -o Dpkg::Options::=--force-confold "$@" </dev/null >"$WORK/apt.log" 2>&1 || APT_STATUS=$?
    [ "$APT_STATUS" -eq 0 ] || ! grep -q -e 'Could not get lock' -e 'lock was locked' "$WORK/apt.log"
}

apt_get() {
    work_folder
    within 300 apt_tried "$@" || die "another apt is running: run this again when it has finished"
    [ "$APT_STATUS" -eq 0 ]
}

# What it cannot fetch is a note: the lists that are there may do
apt_update() {
    apt_get update || :
    cp "$WORK/apt.log" "$WORK/update.log"
    ! grep -m 1 -e '^E:' -e '^W: Failed to fetch' "$WORK/update.log" >"$WORK/said" ||
        note "apt-get update: $(cat "$WORK/said")"
}

# Whether the distribution's servers have this release no more, by what they told apt-get update
packages_moved() {
    grep -E '^[EW]: .*(ubuntu\.com|debian\.org)' "$WORK/update.log" 2>/dev/null |
        grep -q -e ' 404 ' -e 'not have a Release file' -e 'no longer has a Release file'
}

apt_install() {
    changed "installing $*"
    apt_get install --no-install-recommends "$@" || {
        tail -n 15 "$WORK/apt.log" >&2
        ! packages_moved || say_where_packages_moved >&2
        die "apt-get could not install $*: put right what it says above, then run this again"
    }
}

packaged() { apt-cache policy "$1" 2>/dev/null | grep -q 'Candidate: [^(]'; }

# The first interpreter that dockhand runs on; the distribution's own before others
find_python() {
    for python in /usr/bin/python3 /usr/bin/python2.7 python3 python2.7; do
        if "$python" -c "import sys; v = sys.version_info; sys.exit(not (v >= (3, 6) or v[:2] == (2, 7)))" \
            2>/dev/null; then command -v "$python"; return 0; fi
    done
    return 1
}

static_busybox() { [ -x /bin/busybox ] && ! ldd /bin/busybox 2>/dev/null | grep -q '=>'; }

engine_version() {
    if have dockerd; then dockerd --version; else docker --version; fi 2>/dev/null |
        sed -n 's/^Docker version \([0-9]*\.[0-9]*\).*/\1/p'
}

# A client alone is no engine; before 1.12 the engine was inside the docker command
engine_present() {
    have docker || return 1
    if ! have dockerd; then
        version=$(engine_version)
        if [ -z "$version" ] || at_least "$version" 1.12; then return 1; fi
    fi
    [ $INIT != systemd ] || systemctl cat docker.service >/dev/null 2>&1
}

# Of a machine that runs what another one sends it
missing_for_worker() {
    engine_present || echo docker.io
    have sshd || echo openssh-server
    have ip || echo iproute2
    have xz || echo xz-utils
    [ -s /etc/ssl/certs/ca-certificates.crt ] || echo ca-certificates
    [ ! -d /sys/kernel/security/apparmor ] || have apparmor_parser || echo apparmor
}

missing_packages() {
    if [ -n "$WORKER" ]; then
        missing_for_worker
        return
    fi
    engine_present || echo docker.io
    have nginx || echo nginx
    have git || echo git
    have sshd || echo openssh-server
    [ -z "$DEMO" ] || have ssh || echo openssh-client       # Debian 14's openssh-server brings none
    have sudo || echo sudo
    static_busybox || echo busybox-static        # takes the place of one that is not static
    find_python >/dev/null || case $RELEASE in
        'ubuntu 12.04' | 'ubuntu 14.04' | 'ubuntu 16.04') echo python2.7 ;;     # their 3 is too old
        *) echo python3 ;; esac
    [ -z "$LOCAL_NAME" ] || [ $INIT = none ] || have avahi-daemon || echo avahi-daemon
    # only recommended with docker.io; without them an engine, a pull or an ADD fails on some hosts
    have ip || echo iproute2
    have xz || echo xz-utils
    have openssl || echo openssl
    have cron || have crond || echo cron         # for the crontab of a repository
    # those of the oldest releases speak a protocol that is gone
    have certbot || case $RELEASE in 'ubuntu 12.04' | 'ubuntu 14.04') ;; *) echo certbot ;; esac
    have goaccess || echo goaccess               # for dockhand report
    [ -s /etc/ssl/certs/ca-certificates.crt ] || echo ca-certificates
    [ ! -d /sys/kernel/security/apparmor ] || have apparmor_parser || echo apparmor
    grep -qE ' cgroup2? ' /proc/mounts ||
        if [ $INIT = upstart ]; then echo cgroup-lite; else echo cgroupfs-mount; fi
}

ensure_packages() {
    missing=$(missing_packages)
    [ -n "$missing" ] || return 0
    apt_update
    set --
    for package in $missing; do
        if [ "$package" = docker.io ]; then
            packaged docker.io || continue      # require_engine says what to do
            if packaged docker-cli && ! have docker; then set -- "$@" docker-cli; fi
        fi
        if [ "$package" = certbot ] && ! packaged certbot; then
            note "no certbot in $RELEASE's lists (on Ubuntu, enable universe): dockhand https will want it"
            continue
        fi
        if [ "$package" = goaccess ] && ! packaged goaccess; then continue; fi     # it says so itself
        set -- "$@" "$package"
    done
    [ $# -eq 0 ] || apt_install "$@"
}

# Where docker.io is the distribution's and buildx apart: builds with RUN --mount want it
ensure_buildx() {
    if docker buildx version >/dev/null 2>&1 || ! dpkg -s docker.io >/dev/null 2>&1; then return 0; fi
    if packaged docker-buildx; then apt_install docker-buildx; fi
}

# Says what to bring by hand where the release has no docker.io
require_engine() {
    if engine_present; then
        version=$(engine_version)
        ! at_least "${version:-0.0}" 1.9 || require_kernel 3.10 "docker $version"
        return 0
    fi
    {
        say "there is no docker.io package in $RELEASE's lists"
        note "Ubuntu 14.04 and later: enable universe in /etc/apt/sources.list."
        note "Ubuntu 12.04: get one of these files from docker's own archive and, as root,"
        note "  dpkg -i docker-engine_17.04.0~ce-0~ubuntu-precise_amd64.deb; apt-get -y -f install"
        note "  tar -xzf docker-17.03.2-ce.tgz -C /usr/local/bin --strip-components=1"
        note "  (the second is docker's static binaries: this script then writes their job)"
        note "Both need Linux 3.10 (3.8 runs docker up to 1.8, its package lxc-docker); this is $KERNEL."
        note "A later one: apt-get install $(kernel_package); reboot"
        ! packages_moved || say_where_packages_moved
    } >&2
    die "docker's engine is missing: install it as said above, then run this again"
}

# ---- services -------------------------------------------------------------------------------

is_up() {
    case $INIT-$1 in
    *-docker) docker ps -q >/dev/null 2>&1 ;;
    systemd-*) systemctl --quiet is-active "$1" ;;
    *-nginx) alive nginx /run/nginx.pid ;;
    *-ssh) alive sshd /run/sshd.pid ;;
    *-avahi-daemon) alive avahi-daemon /run/avahi-daemon/pid ;;
    *-cron) alive cron /run/crond.pid ;;
    esac
}

start_engine() {
    # a container that was restarted has pid files whose numbers are other processes' now
    for file in docker.pid docker/containerd/containerd.pid; do
        alive dockerd "/run/$file" || alive containerd "/run/$file" || rm -f "/run/$file"
    done
    setsid dockerd </dev/null >>/var/log/dockerd.log 2>&1 &
}

start_service() {
    case $INIT-$1 in
    systemd-*) systemctl start "$1" ;;
    none-docker) start_engine ;;
    none-ssh) mkdir -p /run/sshd; "$(command -v sshd)" ;;
    none-*) "$1" ;;
    *)
        if [ ! -f "/etc/init/$1.conf" ]; then service "$1" start
        else status "$1" | grep -q start/running || start "$1"; fi ;;
    esac </dev/null >/dev/null
}

say_where_it_logs() { if [ $INIT = systemd ]; then echo "journalctl -u $1"; else echo "/var/log"; fi; }

# ensure_up NAME [SECONDS]: runs now, and at boot
ensure_up() {
    if [ $INIT = systemd ] && ! systemctl --quiet is-enabled "$1" 2>/dev/null; then
        systemctl --quiet enable "$1" 2>/dev/null || return 1
        changed "$1 starts at boot"
    fi
    is_up "$1" || { start_service "$1" && within "${2:-60}" is_up "$1" && changed "started $1"; }
}

ensure_service() { ensure_up "$1" || die "$1 does not start: see $(say_where_it_logs "$1")"; }

# holders PORT: who listens on it, as PROGRAM (process NUMBER)
holders() {
    ss -ltnp "sport = :$1" 2>/dev/null |
        sed -n 's/.*users:(("\([^"]*\)",\(pid=\)\{0,1\}\([0-9]*\),.*/\1 (process \3)/p' | sort -u
}

# The ports that nginx found taken, by its log
refused_ports() {
    tail -n 20 /var/log/nginx/error.log 2>/dev/null |
        sed -n 's/.* bind() to .*:\([0-9]*\) failed (98: .*/\1/p' | sort -nu
}

ensure_nginx() {
    ! ensure_up nginx || return 0
    for port in $(refused_ports) 80; do
        holder=$(holders "$port" | head -n 1)
        [ -z "$holder" ] || die "nginx does not start, since $holder has port $port:" \
            "stop that, or give it another port, then run this again"
    done
    die "nginx does not start: see $(say_where_it_logs nginx)"
}

# docker's static binaries bring no job. "started docker" has to mean that it answers.
ensure_docker_job() {
    if [ $INIT != upstart ] || [ -e /etc/init/docker.conf ] || [ -e /etc/init.d/docker ]; then return 0; fi
    cat >/etc/init/docker.conf.new <<JOB
description "docker's engine from its static binaries, written by $ME"
start on (local-filesystems and net-device-up IFACE!=lo)
stop on runlevel [!2345]
limit nofile 524288 1048576
respawn
kill timeout 20
exec $(command -v dockerd)
post-start script
    n=0
    until docker ps >/dev/null 2>&1 || [ \$n -ge 300 ]; do n=\$((n + 1)); sleep 0.1; done
end script
JOB
    mv /etc/init/docker.conf.new /etc/init/docker.conf
    changed "wrote /etc/init/docker.conf"
}

ensure_docker() {
    ensure_docker_job
    ensure_service docker
    if docker info 2>/dev/null | grep -q '^ *rootless$'; then
        die "docker is rootless, its containers' addresses cannot be reached: apt-get install docker.io"
    fi
}

ensure_ssh() {
    if [ -z "$(find /etc/ssh -name 'ssh_host_*_key' -size +0)" ]; then
        ssh-keygen -A >/dev/null
        changed "made this host's ssh keys"
    fi
    # Ubuntu 22.10 and later: systemd listens, sshd starts at the first connection
    if [ $INIT = systemd ] && systemctl --quiet is-enabled ssh.socket 2>/dev/null; then set -- ssh.socket
    else set -- ssh; fi
    ensure_service "$1"
}

# Only the crontab of a repository wants it: no reason to fail
ensure_cron() {
    if ! have cron || ensure_up cron 10 2>/dev/null; then return 0; fi
    note "cron does not run, crontabs of apps will not: see $(say_where_it_logs cron)"
}

# .local names are a convenience, no reason to fail
ensure_local_name() {
    if [ -z "$LOCAL_NAME" ]; then return 0
    elif [ $INIT = none ]; then
        note "no $(uname -n).local here: avahi-daemon needs dbus and an init"
    elif ! ensure_up avahi-daemon 10 2>/dev/null; then
        note "no $(uname -n).local here: avahi-daemon does not run ($(say_where_it_logs avahi-daemon))"
    fi
}

ensure_dockhand() {
    set -- install
    [ -z "$GIT_USER" ] || set -- "$@" --user "$GIT_USER"
    work_folder
    status=0
    "$(find_python)" "$HERE/dockhand.py" "$@" >"$WORK/install" || status=$?
    cat "$WORK/install"
    [ "$status" -eq 0 ] || exit "$status"
    grep -qx 'nothing changed' "$WORK/install" || CHANGED=yes
}

say_if_nothing_changed() { [ -n "$CHANGED" ] || say "nothing to install or to start: this system was ready"; }

# ---- the demonstration ----------------------------------------------------------------------

show() { echo "\$ $1"; eval "$1"; }

# timed LINE: shows it, runs it, says how long it took; ends with its status
timed() {
    began=$(date +%s.%N)
    status=0
    show "$1" || status=$?
    echo "$began $(date +%s.%N)" | awk '{ printf "       (%.1f s)\n", $2 - $1 }'
    return $status
}

# expect TEXT: what the app answers through nginx
expect() {
    if have curl; then ask='curl -s -m 10 -H'; else ask='busybox wget -q -O - --header'; fi
    timed "$ask 'Host: demo-app' http://127.0.0.1/" | tee "$WORK/answer"
    grep -qx "$1" "$WORK/answer" || die "the demonstration expected '$1'"
}

# push_is TEXT: pushes, and git or dockhand has to say the text
push_is() {
    timed 'git push host HEAD:main' 2>&1 | tee "$WORK/push"
    grep -q "$1" "$WORK/push" || die "the demonstration expected that git push says '$1'"
}

free_port() {
    port=8800
    while grep -qi ":$(printf %04X $port) [0-9a-f]*:0000 0A" /proc/net/tcp*; do port=$((port + 1)); done
    echo $port
}

refuse_taken_demo() {
    ! dockhand apps | grep -q '^demo-app ' || die "no demonstration: there is an app demo-app already"
    ! dockhand keys | grep -q '^demo-key ' || die "no demonstration: there is a key demo-key already"
    busybox httpd --help 2>&1 | grep -q Usage || die "no demonstration: this busybox has no httpd"
}

# Nobody's ~/.gitconfig, ~/.ssh or proxy. git 1.7.9 knows no GIT_SSH_COMMAND, hence a script.
demo_environment() {
    work_folder
    export HOME="$WORK" GIT_CONFIG_NOSYSTEM=1 GIT_SSH="$WORK/ssh" GIT_SSH_VARIANT=ssh
    export GIT_AUTHOR_NAME=demo GIT_AUTHOR_EMAIL=demo@localhost
    export GIT_COMMITTER_NAME=demo GIT_COMMITTER_EMAIL=demo@localhost
    unset http_proxy HTTP_PROXY all_proxy ALL_PROXY
    ssh-keygen -q -t ecdsa -N '' -C demo-key -f "$WORK/key"
    cat >"$WORK/ssh" <<FILE
#!/bin/sh
exec ssh -F /dev/null -i "$WORK/key" -p "$(sshd -T | awk 'tolower($1) == "port" { print $2; exit }')" \
    -o IdentitiesOnly=yes -o BatchMode=yes -o LogLevel=ERROR \
    -o StrictHostKeyChecking=no -o UserKnownHostsFile="$WORK/known_hosts" "\$@"
FILE
    chmod 755 "$WORK/ssh"
}

# file NAME: writes a file of the demonstration, and shows it
file() {
    cat >"$1"
    show "cat $1"
}

plain_files() {
    cp /bin/busybox .
    show 'echo Hello from a container >index.html'
    file Dockerfile <<'FILE'
FROM scratch
COPY busybox /bin/
COPY index.html /www/
EXPOSE 80
CMD ["/bin/busybox", "httpd", "-f", "-h", "/www"]
FILE
}

# job_files PORT INIT: INIT is an option of docker run, or nothing
job_files() {
    show 'echo Hello from a job >index.html'
    file upstart.conf <<FILE
start on started docker
stop on stopping docker
respawn
exec docker run --rm ${2:+$2 }-p 127.0.0.1:$1:80 demo-app
FILE
    file nginx-proxy.conf <<FILE
server {
    listen 80;
    server_name demo-app;
    location / { proxy_pass http://127.0.0.1:$1; }
}
FILE
}

demo_repository() {
    say "an app is a repository"
    show 'mkdir demo-app && cd demo-app && git init -q'
    show "git remote add host $(stat -c %U /var/lib/dockhand/build)@127.0.0.1:demo-app"
}

demo_key() {
    say "whoever may push has a key"
    MADE_KEY=demo-key
    cd "$WORK"
    show 'dockhand upload-key demo-key <key.pub'
}

demo_plain() {
    say "its Dockerfile says how it is built, and what of it runs"
    plain_files
    show 'git add . && git commit -q -m "an app"'
    push_is 'Release 1 is live'
    expect 'Hello from a container'

    say "a change: the new release answers before the old one stops"
    show 'echo Hello again >index.html'
    show 'git commit -q -a -m "a change"'
    push_is 'Release 2 is live: .*, no gap'
    expect 'Hello again'

    say "a push that fails is refused, and what ran goes on running"
    show "echo 'RUN [\"/bin/busybox\", \"false\"]' >>Dockerfile"
    show 'git commit -q -a -m "a mistake"'
    push_is 'dockhand: the build failed'
    expect 'Hello again'
    show 'git reset -q --hard HEAD^'
}

demo_job() {
    say "what needs ports of the server or docker's own options brings the job that runs it"
    [ -e Dockerfile ] || plain_files
    if have docker-init; then job_files "$(free_port)" --init; else job_files "$(free_port)" ''; fi
    show 'git add . && git commit -q -m "a job"'
    push_is 'is live'
    expect 'Hello from a job'
}

run_demo() {
    refuse_taken_demo
    demo_environment
    demo_key
    demo_repository

    MADE_APP=demo-app
    # what has a Dockerfile alone wants docker 1.11; an older one, with Upstart, runs jobs
    ! at_least "$(engine_version)" 1.11 || demo_plain
    demo_job
}

# ---- table of contents ----------------------------------------------------------------------

main() {
    parse_options "$@"
    require_root
    require_dockhand
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap 'exit 129' HUP

    look_around
    require_kernel 3.8 docker
    refuse_other_dockers
    ensure_packages
    require_engine
    if [ -n "$WORKER" ]; then
        ensure_docker
        ensure_ssh
        say_if_nothing_changed
        return
    fi
    ensure_buildx

    ensure_docker
    ensure_nginx
    ensure_ssh
    ensure_cron
    ensure_local_name
    ensure_dockhand
    say_if_nothing_changed
    [ -z "$DEMO" ] || run_demo
}

main "$@"
