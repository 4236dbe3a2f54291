"use strict";

const LOGGED_OUT = 4001;
const at = (id) => document.getElementById(id);

function connect() {
  const socket = new WebSocket(new URL("/live/changes", location.href.replace(/^http/, "ws")));
  socket.onopen = () => { at("state").textContent = "Your note, as it is now:"; };
  socket.onmessage = (event) => { at("note").textContent = JSON.parse(event.data).note || "There is none yet."; };
  socket.onclose = (event) => {
    if (event.code === LOGGED_OUT) {
      leave();
    } else { // the server starts anew, or the session has another id, by the cookie that this browser has now
      at("state").textContent = "Connecting …";
      setTimeout(connect, 1000);
    }
  };
}

function leave() {
  document.querySelector("nav").remove();
  document.querySelector("main").replaceChildren(at("goodbye").content);
  document.title = "Logged out";
}

connect();
