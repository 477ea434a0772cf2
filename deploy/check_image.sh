#!/usr/bin/env bash
# Builds the image and checks it: a non-root user, a read-only root filesystem, the health check, a served request, and a
# drain on SIGTERM with exit code 0.
#
#   deploy/check_image.sh                                    the image with ENGINE=none, and a simulated engine
#   ENGINE=cpu deploy/check_image.sh                         the image with vLLM and its own configuration
#   BASE=python:3.12-slim-bookworm deploy/check_image.sh     on a base image from a registry
#
# Without BASE it makes a base image from Debian packages. Needs root, buildah, and mmdebstrap without BASE. pip in the
# build uses this machine's configuration; MOUNTS are more folders that it needs. Prints what it checked.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ENGINE=${ENGINE:-none}
IMAGE=localhost/antares-check-$ENGINE
work=$(mktemp -d)
gateway=
# shellcheck disable=SC2317
finish() {
  [[ -z $gateway ]] || kill -KILL "$gateway" 2>/dev/null || true
  for mounted in tmp dev/shm sys proc antares/cache .; do
    mountpoint -q "$work/root/$mounted" && umount "$work/root/$mounted"
  done
  [[ ! -e $work/container ]] || buildah rm "$(cat "$work/container")" >/dev/null
  rm -rf "$work"
}
trap finish EXIT

passed() { echo "ok: $*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }

for tool in buildah setpriv unshare; do
  command -v "$tool" >/dev/null || fail "this check needs $tool"
done
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-vfs}

if [[ -z ${BASE:-} ]]; then
  BASE=localhost/antares-base
  if ! buildah inspect --type image "$BASE" >/dev/null 2>&1; then
    command -v mmdebstrap >/dev/null || fail "set BASE, or install mmdebstrap"
    mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/base.tar"
    base=$(buildah from scratch)
    buildah add --quiet "$base" "$work/base.tar" / >/dev/null
    buildah run "$base" -- ln -sf python3 /usr/bin/python
    buildah commit --quiet --rm "$base" "$BASE" >/dev/null
    rm "$work/base.tar"
  fi
  passed "base image of Debian packages"
fi

options=(--build-arg "BASE=$BASE" --build-arg "ENGINE=$ENGINE" --network host)
# The package indexes and certificates of this machine.
for path in /etc/pip.conf ~/.config/pip/pip.conf /etc/ssl/certs/ca-certificates.crt ${MOUNTS:-}; do
  [[ ! -e $path ]] || options+=(--volume "$path:$path:ro")
done
started=$SECONDS
buildah build --quiet --layers --format docker "${options[@]}" --tag "$IMAGE" . >/dev/null
passed "image built in $((SECONDS - started)) s"

user=$(buildah inspect --type image --format '{{.OCIv1.Config.User}}' "$IMAGE")
[[ $user =~ ^[1-9][0-9]*$ ]] || fail "the image's user is '$user'"
passed "its user is $user"
health=$(buildah inspect --type image --format '{{.Docker.Config.Healthcheck.Test}}' "$IMAGE")
[[ $health == "[CMD antares health"* ]] || fail "its health check is $health"
passed "its health check is $health"

# Run it as a container engine does with --read-only --tmpfs /tmp --user: a read-only bind mount of its filesystem.
buildah from --pull-never "$IMAGE" >"$work/container"
root=$(buildah mount "$(cat "$work/container")")
mkdir -p "$work/root" "$root/dev/shm"
mount --bind "$root" "$work/root"
mount -o remount,bind,ro "$work/root"
mount -t proc proc "$work/root/proc"
mount --bind -o ro /sys "$work/root/sys"
for folder in tmp dev/shm; do mount -t tmpfs -o mode=1777 tmpfs "$work/root/$folder"; done
mount --bind "$root/antares/cache" "$work/root/antares/cache"
if [[ $ENGINE == cpu ]]; then
  cp "$root/antares/configs/container.yaml" "$work/root/tmp/antares.yaml"
else
  cat >"$work/root/tmp/antares.yaml" <<YAML
server: { allow_anonymous: true, drain_s: 20 }
engines: [{ kind: simulated, step_times: { d: 0.02 } }]
classes: { chat: {} }
default_class: chat
YAML
fi

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
# chroot needs its capability, so the order is: chroot, then drop everything.
inside() {
  exec chroot "$work/root" /usr/bin/setpriv --reuid "$user" --regid "$user" --clear-groups --no-new-privs \
    --bounding-set=-all --inh-caps=-all /usr/bin/env -i PATH=/antares/venv/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp \
    PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/antares/cache "$@"
}
(inside antares serve --config /tmp/antares.yaml --host 127.0.0.1 --port "$port") >"$work/log" 2>&1 &
gateway=$!
check() { (inside antares health --url "http://127.0.0.1:$port" "$@") >/dev/null 2>&1; }
for _ in $(seq 480); do
  check --ready && break
  kill -0 "$gateway" 2>/dev/null || { cat "$work/log"; fail "the gateway ended"; }
  sleep 0.5
done
check --ready || { cat "$work/log"; fail "the gateway is not ready"; }
passed "the health check passes inside"

grep -q "^Uid:[[:space:]]*$user[[:space:]]*$user" "/proc/$gateway/status" || fail "it runs as another user"
grep -q "^CapEff:[[:space:]]*0*$" "/proc/$gateway/status" || fail "it has capabilities"
passed "it runs as user $user without capabilities"
if (inside sh -c 'touch /antares/x || touch /etc/x') 2>/dev/null; then fail "the root filesystem is writable"; fi
passed "its root filesystem is read-only"

cat >"$work/client.py" <<'PYTHON'
import json, sys, urllib.request

body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100, "stream": True}
request = urllib.request.Request(
    f"http://127.0.0.1:{sys.argv[1]}/v1/chat/completions",
    json.dumps({**body, "ignore_eos": True}).encode(),
    {"content-type": "application/json"},
)
with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
    assert answer.read(1)
    print("begun", flush=True)
    assert answer.read().endswith(b"data: [DONE]\n\n")
PYTHON
python3 "$work/client.py" "$port" >"$work/client.log" &
client=$!
for _ in $(seq 100); do grep -q begun "$work/client.log" && break || sleep 0.1; done
kill -TERM "$gateway"
wait "$client" || fail "SIGTERM cut a stream"
code=0
wait "$gateway" || code=$?
gateway=
[[ $code -eq 0 ]] || { cat "$work/log"; fail "the gateway ended with $code"; }
passed "SIGTERM drains: the stream ended, exit code 0"
