#!/bin/sh
# HAProxy as Ray Serve starts it, with two changes to the file that Ray writes: its metrics and statistics listen on loopback (Ray's
# template binds them to all interfaces), and questions that a replica died over are asked again of another one. What is told is not:
# only who told it knows whether twice is once.
# RECRAY_HAPROXY: the binary itself. Arguments: Serve's, -f CONFIG among them.
again='http-request disable-l7-retry unless { path_end /v1/recommend /v1/score /v1/history /v1/similar /v1/models /healthz /readyz }'
for argument in "$@"; do
    if [ "$previous" = -f ]; then
        sed -i -e '/^frontend prometheus/,/^frontend http/s/bind :/bind 127.0.0.1:/' -e '/^listen stats/,$s/bind \*:/bind 127.0.0.1:/' \
            -e 's/^\( *retry-on\) conn-failure$/\1 conn-failure empty-response/' -e "/^frontend http_frontend/a\\    $again" "$argument"
    fi
    previous=$argument
done
exec "$RECRAY_HAPROXY" "$@"
