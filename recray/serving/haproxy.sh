#!/bin/sh
# HAProxy as Ray Serve starts it, with five changes to the file that Ray writes: its metrics and statistics listen on loopback (Ray's
# template binds them to all interfaces); a request that does not arrive whole within ten seconds takes no replica's place; what is more
# than the replicas are to take is refused here, where that costs them little; refusals of Serve's own are problem documents like all
# others; and questions that a replica died over are asked again of another one. What is told is not: only who told it knows whether twice
# is once.
# RECRAY_HAPROXY: the binary itself. RECRAY_PLACES: requests that this HAProxy gives to a replica, working or waiting (unset: as many as
# Serve lets in).
# Arguments: Serve's, -f CONFIG among them.
again='http-request disable-l7-retry unless { path_end /v1/recommend /v1/score /v1/history /v1/similar /v1/models /healthz /readyz }'
slow='{"title": "Request Timeout", "status": 408, "detail": "the request did not arrive whole", "fix": "send it at once", "errors": []}'
waits="option http-buffer-request\n    timeout http-request 10s\n    timeout http-keep-alive 3600s\n"
waits="$waits    http-error status 408 content-type application/problem+json string '$slow'"
busy='"title": "Service Unavailable", "status": 503, "fix": "come again", "errors": []'
busy="return status 503 content-type application/problem+json hdr Retry-After 1 string '{$busy"
told="http-response $busy, \"detail\": \"too many requests wait\"}' if { status 503 } { res.hdr(content-type) -m beg text/plain }"
full="http-request set-var(txn.places) nbsrv,mul(${RECRAY_PLACES:-4096})\n    http-request $busy, \"detail\": \"all replicas have what they can take\"}' \
if { nbsrv gt 0 } { be_conn,sub(txn.places) gt 0 } !{ path /healthz /readyz }"
for argument in "$@"; do
    if [ "$previous" = -f ]; then
        sed -i -e '/^frontend prometheus/,/^frontend http/s/bind :/bind 127.0.0.1:/' -e '/^listen stats/,$s/bind \*:/bind 127.0.0.1:/' \
            -e 's/^\( *retry-on\) conn-failure$/\1 conn-failure empty-response/' -e "/^defaults/a\\    $waits" \
            -e "/^frontend http_frontend/a\\    $again\\n    $told" -e "/^backend http-recray$/a\\    $full" "$argument"
    fi
    previous=$argument
done
exec "$RECRAY_HAPROXY" "$@"
