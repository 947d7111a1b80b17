#!/bin/sh
# Create the run if there is none, write its ticket to /ticket, and serve it.
set -eu
run="${LUTETIA_RUN_FOLDER:-/var/lib/lutetia/run}"
if [ ! -f "$run/manifest.json" ]; then
    lutetia run create "${LUTETIA_DATA:-/data}" "$run" --address "${LUTETIA_RUN_ADDRESS:?set it to the host:port where nodes reach this coordinator}"
fi
cp "$run/ticket.txt" /ticket/ticket.part
mv /ticket/ticket.part /ticket/ticket.txt
exec lutetia coordinator serve "$run" "$@"
