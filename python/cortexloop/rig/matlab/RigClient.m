classdef RigClient < handle
% RigClient  A rig's link to a session that `cortexloop serve` serves, over plain TCP.
%
%   rig = RigClient('192.168.1.10', 5558, 'monkeylogic', 'the secret');
%   batch = rig.next();                          % the first batch to show
%   while ~isempty(batch)
%       for k = 1:numel(batch.order)
%           image = batch.images(:, :, :, batch.order(k));   % uint8 height x width x 3, sRGB
%           ... show it, count spikes ...
%       end
%       rig.shown(struct('pres_id', batch.pres_ids, 't_on', num2cell(onsets), 'clock', 'monkeylogic'));
%       rig.tell(batch, rates, {'ch1', 'ch2'});  % presentations x units
%       batch = rig.next(batch);                 % empty when the session is over
%   end
%   rig.close();
%
% This one file and base functions: MATLAB R2016b or later; GNU Octave 7 or later with the package instrument-control.
%
% A request that gets no answer is sent again, under the same id and over a new connection, so that it takes effect
% once. What the server refuses becomes an error whose identifier has its code: 'RigClient:PAUSED', 'RigClient:NAN', ...
%
% MATLAB says nothing while it is busy with a trial, so give the session a long `stale_after_s`, or call heartbeat().

    properties
        host            % name or address of the server's computer
        port            % of its TCP connection, 5558 if it was not changed
        name            % of this program, as it is to appear in the journal
        secret = ''     % what the server's configuration says, '' for none
        timeout = 5     % seconds until a request is sent again
        retries = 10    % how often, before an error 'RigClient:TIMEOUT'
        roles = {'display', 'acquisition'}
        resent = 0      % requests that had to be sent again so far
        welcome = []    % what the server answered to the last hello
    end

    properties (SetAccess = private)
        socket = []
        prefix = ''
        number = 0
        started = 0
        modern = true
    end

    methods
        function self = RigClient(host, port, name, secret)
            % Connects and says hello.
            if nargin < 3, name = 'matlab'; end
            if nargin >= 4, self.secret = secret; end
            self.host = host;
            self.port = port;
            self.name = name;
            self.started = tic;
            % Not rand, which begins alike each time MATLAB starts.
            self.prefix = sprintf('m%.0f-%.0f', now * 86400000, mod(double(self.started), 1e9));
            if exist('OCTAVE_VERSION', 'builtin')
                pkg('load', 'instrument-control');
            end
            self.hello();
        end

        function close(self)
            % Close the connection; the session goes on.
            self.socket = [];
        end

        function reply = hello(self)
            % Connect anew. The reply has session, resume, config.
            self.close();
            reply = self.request(struct('type', 'hello'));
        end

        function batch = ask(self, after, within_ms)
            % The batch to show after another one ([]: the first that is not told); the same until it is told.
            %
            % within_ms: when it has to be here, else a filler comes (batch.kind is 'filler'); the session's own if not
            % given.
            %
            % batch has batch_id, kind, stream, generation, items (struct array: item_id, kind, stream, sha), images
            % (uint8 height x width x 3 x items), order (presentations in their order, as numbers of items, from 1) and
            % pres_ids (a name for each presentation).
            header = struct('type', 'ask');
            if nargin >= 2 && ~isempty(after)
                if isstruct(after), after = after.batch_id; end
                header.after = after;
            end
            if nargin >= 3 && ~isempty(within_ms), header.within_ms = within_ms; end
            [batch, data] = self.request(header);
            sizes = double(batch.shape(:)');
            % Bytes come with the last axis running fastest; MATLAB's first axis does.
            batch.images = permute(reshape(data, fliplr(sizes)), [3 2 1 4]);
            batch.order = double(batch.order(:)') + 1;
            batch.pres_ids = cellstr(batch.pres_ids);
            batch.pres_ids = batch.pres_ids(:)';
        end

        function batch = next(self, after, within_ms)
            % As ask, but waits while the session is paused, and gives [] when it is over.
            if nargin < 2, after = []; end
            if nargin < 3, within_ms = []; end
            while true
                try
                    batch = self.ask(after, within_ms);
                    return
                catch problem
                    switch problem.identifier
                        case 'RigClient:FINISHED'
                            batch = [];
                            return
                        case 'RigClient:PAUSED'
                            pause(0.25);
                        case 'RigClient:BUSY'  % the server has waited already
                            pause(0.01);
                        otherwise
                            rethrow(problem);
                    end
                end
            end
        end

        function reply = shown(self, events)
            % What was shown when: a struct array with pres_id, and what is known of outcome ('ok', 'no_fix', 'abort',
            % 'late_flip', 'not_shown'), t_on, t_off, clock, frame, missed, diode, ttl, acquisition. [] is left out.
            list = cell(1, numel(events));
            for k = 1:numel(events)
                event = struct();
                fields = fieldnames(events);
                for f = 1:numel(fields)
                    value = events(k).(fields{f});
                    if ~isempty(value), event.(fields{f}) = value; end
                end
                list{k} = event;
            end
            reply = self.request(struct('type', 'shown', 'events', {list}));
        end

        function reply = tell(self, batch, responses, units, options)
            % Responses, [presentations x units] in the order of batch.pres_ids.
            %
            % options: a struct with any of
            %   pres_ids  what the rows are, if they are not all presentations in their order
            %   status    cell array, per row 'ok', 'missing', 'artifact' or 'gap'; what is not ok is shown again
            %   kind      'count', 'rate' (if not given) or 'score'
            %   window_ms, baseline_ms   counting windows from stimulus onset, [begin end]
            %   final     true: nothing more will come for this batch
            %
            % The reply has accepted (rows), ignored, dup.
            if nargin < 5, options = struct(); end
            units = cellstr(units);
            pres_ids = batch.pres_ids;
            if isfield(options, 'pres_ids'), pres_ids = cellstr(options.pres_ids); end
            rows = numel(pres_ids);
            if ~isequal(size(responses), [rows, numel(units)])
                error('RigClient:BAD_SHAPE', 'responses should be %d x %d (presentations x units), got %s', ...
                    rows, numel(units), mat2str(size(responses)));
            end
            item_ids = cell(1, rows);
            for k = 1:rows
                place = find(strcmp(batch.pres_ids, pres_ids{k}), 1);
                if isempty(place)
                    error('RigClient:UNKNOWN_ITEM', 'batch %s has no presentation %s', batch.batch_id, pres_ids{k});
                end
                item_ids{k} = batch.items(batch.order(place)).item_id;
            end
            header = struct('type', 'tell', 'batch_id', batch.batch_id);
            header.item_ids = item_ids;
            header.pres_ids = pres_ids(:)';
            header.units = units(:)';
            header.dtype = 'float64';
            if isfield(options, 'status')
                status = cellstr(options.status);
                header.status = status(:)';
            end
            for name = {'window_ms', 'baseline_ms'}
                if isfield(options, name{1}), header.(name{1}) = options.(name{1})(:)'; end
            end
            for name = {'kind', 'final'}
                if isfield(options, name{1}), header.(name{1}) = options.(name{1}); end
            end
            reply = self.request(header, typecast(reshape(double(responses)', 1, []), 'uint8'));
        end

        function reply = status(self)
            % How it is going: state, streams, deadline_misses, ...
            reply = self.request(struct('type', 'status'));
        end

        function reply = note(self, text)
            % Put a remark into the journal.
            reply = self.request(struct('type', 'note', 'text', text));
        end

        function reply = pause_session(self, reason)
            % No more batches until resume_session.
            if nargin < 2, reason = ''; end
            reply = self.request(struct('type', 'pause', 'reason', reason));
        end

        function reply = resume_session(self)
            % Go on.
            reply = self.request(struct('type', 'resume'));
        end

        function reply = stop_session(self, reason)
            % End the session for good.
            if nargin < 2, reason = ''; end
            reply = self.request(struct('type', 'stop', 'reason', reason));
        end

        function reply = heartbeat(self)
            % Tell the server that this client is still here.
            reply = self.request(struct('type', 'heartbeat'));
        end

        function t = now_ns(self)
            % This client's clock, in nanoseconds since it was made.
            t = floor(toc(self.started) * 1e9);
        end

        function reply = sync_clock(self, clock, exchanges)
            % Let the server estimate the offset of this client's clock: at the start, then every few seconds. Events
            % then give t_on = now_ns() of the flip, and this name as their clock.
            if nargin < 2, clock = self.name; end
            if nargin < 3, exchanges = 8; end
            rows = cell(1, exchanges);
            for k = 1:exchanges
                t1 = self.now_ns();
                answer = self.request(struct('type', 'clock', 't1_ns', RigClient.whole(t1)));
                t4 = self.now_ns();
                rows{k} = {RigClient.whole(t1), RigClient.whole(answer.t2_ns), ...
                    RigClient.whole(answer.t3_ns), RigClient.whole(t4)};
            end
            reply = self.request(struct('type', 'clock_report', 'clock', clock, 'exchanges', {rows}));
        end

        function [reply, data] = request(self, header, buffer)
            % Send a message until it is answered; the reply and its bytes.
            if nargin < 3, buffer = zeros(1, 0, 'uint8'); end
            self.number = self.number + 1;
            header.id = sprintf('%s-%d', self.prefix, self.number);
            is_hello = strcmp(header.type, 'hello');
            if is_hello, header = self.introduced(header); end
            patience = self.timeout;
            if isfield(header, 'within_ms'), patience = patience + header.within_ms / 1000; end
            for attempt = 0:self.retries
                if attempt > 0, self.resent = self.resent + 1; end
                try
                    if isempty(self.socket)
                        self.connect();
                        if ~is_hello
                            self.number = self.number + 1;
                            greeting = self.introduced(struct('type', 'hello', 'id', ...
                                sprintf('%s-%d', self.prefix, self.number)));
                            self.welcome = self.checked(self.exchange(greeting, [], self.timeout));
                        end
                    end
                    [reply, data] = self.exchange(header, buffer, patience);
                catch problem
                    if ~strcmp(problem.identifier, 'RigClient:LOST'), rethrow(problem); end
                    self.close();
                    pause(min(0.05 * attempt, 1));
                    continue
                end
                if strcmp(reply.type, 'error') && strcmp(reply.code, 'NO_HELLO') && ~is_hello
                    self.close();
                    continue
                end
                self.checked(reply);
                if is_hello, self.welcome = reply; end
                return
            end
            error('RigClient:TIMEOUT', 'no answer from %s:%d to %s, sent %d times; is the server running there?', ...
                self.host, self.port, header.type, self.retries + 1);
        end
    end

    methods (Access = private)
        function header = introduced(self, header)
            header.client = self.name;
            header.roles = self.roles(:)';
            header.versions = {1};
            if ~isempty(self.secret), header.secret = self.secret; end
        end

        function reply = checked(~, reply)
            if strcmp(reply.type, 'error')
                error(['RigClient:' reply.code], '%s', reply.text);
            end
        end

        function connect(self)
            try
                if exist('OCTAVE_VERSION', 'builtin')
                    self.socket = tcpclient(self.host, self.port);
                else
                    self.socket = tcpclient(self.host, self.port, 'Timeout', self.timeout);
                end
            catch problem
                error('RigClient:LOST', '%s', problem.message);
            end
            try
                self.socket.NumBytesAvailable;
                self.modern = true;
            catch
                self.modern = false;
            end
        end

        function [reply, data] = exchange(self, header, buffer, patience)
            text = jsonencode(header);
            if strncmp(header.type, 'clock', 5), text = regexprep(text, '"#(-?\d+)#"', '$1'); end
            text = unicode2native(text, 'UTF-8');
            lengths = [RigClient.big_endian(numel(text)), RigClient.big_endian(numel(buffer))];
            try
                write(self.socket, [lengths, uint8(text(:)'), uint8(buffer(:)')]);
            catch problem
                error('RigClient:LOST', '%s', problem.message);
            end
            begun = tic;
            while true
                lengths = double(self.read_exactly(8, begun, patience));
                header_bytes = lengths(1:4) * [2^24; 2^16; 2^8; 1];
                buffer_bytes = lengths(5:8) * [2^24; 2^16; 2^8; 1];
                if header_bytes > 2^28, error('RigClient:LOST', 'not an answer of a session'); end
                text = self.read_exactly(header_bytes, begun, patience);
                data = self.read_exactly(buffer_bytes, begun, patience);
                try
                    reply = jsondecode(native2unicode(text, 'UTF-8'));
                catch problem
                    error('RigClient:LOST', '%s', problem.message);
                end
                if strcmp(reply.id, header.id) || (strcmp(reply.id, '?') && strcmp(reply.type, 'error'))
                    return
                end
                % The answer to what was given up long ago.
            end
        end

        function bytes = read_exactly(self, count, begun, patience)
            bytes = zeros(1, count, 'uint8');
            got = 0;
            while got < count
                ready = self.available();
                if ready == 0
                    if toc(begun) > patience, error('RigClient:LOST', 'no answer in time'); end
                    pause(0.0005);
                    continue
                end
                try
                    part = read(self.socket, min(ready, count - got));
                catch problem
                    error('RigClient:LOST', '%s', problem.message);
                end
                bytes(got + 1 : got + numel(part)) = uint8(part);
                got = got + numel(part);
            end
        end

        function count = available(self)
            try
                if self.modern
                    count = self.socket.NumBytesAvailable;
                else
                    count = self.socket.BytesAvailable;  % before R2020b
                end
            catch problem
                error('RigClient:LOST', '%s', problem.message);
            end
        end
    end

    methods (Static, Access = private)
        function text = whole(value)
            % A whole number that exchange writes with all its digits; jsonencode would round or add a fraction.
            text = sprintf('#%.0f#', value);
        end

        function bytes = big_endian(count)
            bytes = uint8(mod(floor(count ./ [2^24, 2^16, 2^8, 1]), 256));
        end
    end
end
